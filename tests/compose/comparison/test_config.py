import json
import math
from pathlib import Path

import pytest

from topkd.compose.compare import _build_cell, _tune_rates, compare
from topkd.compose.comparison.cell import FORMER, Cell, _prepare_cell_folder, is_superseded, read_finished
from topkd.compose.comparison.config import EMBEDDED, CompareConfig, _build_arm, from_runs, load_compare, parse_grid
from topkd.compose.config.run_config import RunConfig, read_toml, validate_config
from topkd.compose.run.folder import lock_folder
from topkd.topk.errors import ConfigError

ROOT = Path(__file__).parents[3]
ARMS = [{"name": "a", "set": {"objective": {"kind": "gjs"}}}, {"name": "b", "set": {"k": 5}}]


def config(**changes):
    return CompareConfig.model_validate({"arms": ARMS, "seeds": [0, 1], **changes})


def test_the_shipped_example_is_valid_and_separates_estimator_from_divergence():
    shipped = load_compare(ROOT / "examples" / "compare_scalar_gjs.toml").checked()
    kinds = {(arm.set["objective"]["kind"], arm.set["objective"].get("beta")) for arm in shipped.arms}
    assert {("scalar_kl", None), ("gjs", 0.5), ("topk_pg", 1.0), ("topk_pg", 0.5)} <= kinds


def test_arm_settings_lie_over_the_base_and_another_kind_replaces_the_whole_objective():
    values = config(overrides={"objective": {"kind": "topk_pg", "lam": 0.9}}).values(config().arms[0], seed=7, lr=3e-3)
    assert values["objective"] == {"kind": "gjs"}
    assert (values["seed"], values["learner"]["lr"]) == (7, 3e-3)


def test_seeds_of_the_command_line_take_the_place_of_the_files_and_are_checked_as_they_are(tmp_path):
    shipped = ROOT / "examples" / "compare_scalar_gjs.toml"
    assert load_compare(shipped, (), [7, 8]).seeds == (7, 8)
    with pytest.raises(ConfigError, match=r"tuning seeds must differ .*both hold \[1000\]"):
        load_compare(shipped, (), [0, 1000])
    (tmp_path / "short.toml").write_text('[[arms]]\nname = "a"\n[[arms]]\nname = "b"\nset = { k = 5 }\n')
    assert load_compare(tmp_path / "short.toml").seeds == (0, 1, 2)


def test_a_grid_is_the_product_of_its_axes():
    made = from_runs([], parse_grid(["objective.kind=gjs,topk_pg", "k=5,20"]), [0])
    assert made.base == EMBEDDED
    assert [arm.set for arm in made.arms] == [
        {"objective": {"kind": kind}, "k": k} for kind in ("gjs", "topk_pg") for k in (5, 20)
    ]


def test_a_key_given_twice_has_all_its_values_and_a_single_value_is_nothing_to_compare():
    assert parse_grid(["k=5,20", "k=7"]) == {"k": [5, 20, 7]}
    with pytest.raises(ConfigError, match=r"a comparison needs at least two arms \(--grid\): got kind=gjs"):
        from_runs([], parse_grid(["objective.kind=gjs"]), [0, 1])


def test_a_grids_values_reach_its_arms_as_they_were_typed(tmp_path):
    (tmp_path / "run.toml").write_text(RUN + '[eval]\npath = "p"\nteacher = "t"\n')
    made = from_runs([tmp_path / "run.toml"], parse_grid(["teacher.model=\U0001f680,'a \"b\"'"]), [0])
    assert [arm.set["teacher"]["model"] for arm in made.arms] == ["\U0001f680", 'a "b"']
    with pytest.raises(ConfigError, match=r"config key 'steps' \(arm 'steps=2020-01-01'\)"):
        from_runs([], parse_grid(["steps=2020-01-01,3"]), [0])
    with pytest.raises(ConfigError, match=r"config key 'objective.beta' .*got inf"):
        from_runs([], parse_grid(["objective.beta=inf,0.5"]), [0])


RUN = 'steps = 3\nmax_staleness = 0\n[student]\nmodel = "s"\n[data]\npath = "p"\n[teacher]\nurl = "http://t"\n'


def test_run_files_become_arms_that_differ_from_the_first(tmp_path):
    base = RUN + '[eval]\npath = "p"\nteacher = "t"\n'
    (tmp_path / "one.toml").write_text(base)
    (tmp_path / "two.toml").write_text("k = 7\n" + base)
    made = from_runs([tmp_path / "one.toml", tmp_path / "two.toml"], {}, [0])
    assert [arm.set for arm in made.arms] == [{}, {"k": 7}]


def test_run_files_may_be_called_anything_and_one_file_twice_is_no_comparison(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    names = ["my first try.toml", "ü.toml", "a/run.toml", "run.toml"]
    for place, name in enumerate(names):
        (tmp_path / name).write_text(f'k = {place + 1}\n{RUN}[eval]\npath = "p"\nteacher = "t"\n')
    monkeypatch.chdir(tmp_path / "a")
    made = from_runs([*(tmp_path / name for name in names[:2]), Path("run.toml"), Path("../run.toml")], {}, [0])
    assert [arm.display_name for arm in made.arms] == ["my first try", "ü", "a-run", f"{tmp_path.name}-run"]
    assert [made.values(arm, 0, None)["k"] for arm in made.arms] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="every arm's name must be unique"):
        from_runs([Path("run.toml"), Path("../a/run.toml")], {}, [0])


def test_each_run_file_trains_as_it_would_alone_whatever_the_first_one_says(tmp_path):
    base = RUN + '[eval]\npath = "p"\nteacher = "t"\n'
    first = '[objective]\nkind = "topk_pg"\nbeta = 0.1\nlam = 0.9\n[learner]\nlr = 1e-3\nwarmup_steps = 3\n'
    (tmp_path / "one.toml").write_text(base + first)
    (tmp_path / "two.toml").write_text(base + '[objective]\nkind = "gjs"\n[learner]\nlr = 2e-3\n')
    made = from_runs([tmp_path / "one.toml", tmp_path / "two.toml"], {}, [0])
    for arm in made.arms:
        alone = RunConfig.model_validate(read_toml(tmp_path / f"{arm.name}.toml"))
        assert RunConfig.model_validate(made.values(arm, 0, None)) == alone


def test_arms_of_other_kinds_keep_the_settings_that_all_of_them_have():
    made = from_runs([], parse_grid(["objective.kind=topk_pg,gjs,scalar_kl"]), [0], ["objective.beta=0.2"])
    objectives = [made.values(arm, 0, None)["objective"] for arm in made.arms]
    assert objectives == [{"beta": 0.2, "kind": "topk_pg"}, {"beta": 0.2, "kind": "gjs"}, {"kind": "scalar_kl"}]


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('model = "s"', 'model = "s2"', "student.model"),
        ('[data]\npath = "p"', '[data]\npath = "other"', "data.path"),
        ('[eval]\npath = "p"', '[eval]\npath = "other"', "eval.path"),
        ('teacher = "t"', 'teacher = "t2"', "eval.teacher"),
    ],
)
def test_run_files_that_start_or_are_measured_otherwise_cannot_be_paired(tmp_path, old, new, key):
    base = RUN + '[eval]\npath = "p"\nteacher = "t"\n'
    assert old in base
    (tmp_path / "one.toml").write_text(base)
    (tmp_path / "two.toml").write_text(base.replace(old, new))
    with pytest.raises(ConfigError, match=f"differ in {key} cannot be paired.*arm 'two'.*as arm 'one' has it"):
        from_runs([tmp_path / "one.toml", tmp_path / "two.toml"], {}, [0])


def test_an_arm_of_any_spelling_has_a_folder_of_its_own_and_keeps_its_words():
    labels = ["kind=gjs", "model=/a b/c", "(odd)", *(f"{'x' * 80}{end}" for end in "12"), "--"]
    arms = [_build_arm(label, {}) for label in labels]
    assert [arm.display_name for arm in arms] == labels
    assert len({arm.name for arm in arms}) == len(labels)
    assert [arm.name for arm in arms[:3]] == ["kind=gjs", "model=-a-b-c", "odd-"]


@pytest.mark.parametrize(
    ("table", "got"),
    [
        ("", r"no \[eval\]"),
        ('[eval]\npath = "p"\nscorer = "exact_match"\n', "eval.teacher None"),
        ('[eval]\npath = "p"\nteacher = "t"\nprefixes = ["fresh"]\n', r"prefixes \['fresh'\]"),
    ],
)
def test_a_run_file_that_does_not_measure_the_metric_is_refused_before_it_costs_a_run(tmp_path, table, got):
    (tmp_path / "run.toml").write_text(RUN + table)
    with pytest.raises(ConfigError, match=f"nothing measures reverse_kl.*arm 'k=5'.*{got}.*eval.teacher"):
        from_runs([tmp_path / "run.toml"], parse_grid(["k=5,7"]), [0])


def test_only_the_embedded_pair_is_replayed(tmp_path):
    (tmp_path / "run.toml").write_text(RUN + '[eval]\npath = "p"\nteacher = "t"\n')
    with pytest.raises(ConfigError, match="only a comparison on the embedded pair can replay"):
        config(base=str(tmp_path / "run.toml"), replay=True).checked()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": []}, r"'arms' .*got \[\], expected at least 1 of them$"),
        ({"tuning": {"rates": [1e-3, 3e-3], "seeds": [9]}}, r"'tuning.rates' .*expected at least 3 of them$"),
        ({"tuning": {"rates": [1, 2, math.inf], "seeds": [9]}}, r"'tuning.rates.2' .*expected a finite number$"),
        ({"arms": [{"name": "a/b"}]}, r"'arms.0.name' .*expected text of the form \^\[A-Za-z0-9\]"),
        ({"arms": [{"name": ""}]}, r"'arms.0.name' .*got '', expected text of the form"),
    ],
)
def test_what_is_no_list_name_or_rate_is_told_in_plain_words(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate_config(CompareConfig, {"arms": ARMS, "seeds": [0], **changes}, where="a.toml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": [ARMS[0], ARMS[0]]}, "every arm's name must be unique, but 'a' comes 2 times"),
        ({"arms": [dict(arm, label="same") for arm in ARMS]}, "every arm's label must be unique, but 'same'"),
        ({"seeds": [1, 1]}, "every seed must be unique, but '1'"),
        ({"tuning": {"rates": [1e-3, 2e-3, 3e-3], "seeds": [1]}}, "tuning seeds must differ"),
        ({"tuning": {"rates": [1e-3, 3e-3], "seeds": [9]}}, "at least 3"),
        ({"tuning": {"rates": [3e-3, 2e-3, 1e-3], "seeds": [9]}}, "ascending"),
    ],
)
def test_a_comparison_that_cannot_be_believed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_stale_arm_is_refused_because_staleness_weighs_differently_on_estimators():
    with pytest.raises(ConfigError, match="trains on-policy"):
        config(overrides={"max_staleness": 1}).checked()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": {"seed": 5}}, r"an arm cannot have its own seed.* \(overrides\): got seed = 5"),
        (
            {"arms": [ARMS[0], {"name": "b", "set": {"seed": 5}}]},
            r"its own seed.* \(arm 'b'\): got seed = 5",
        ),
        (
            {"overrides": {"learner": {"lr": 0.1}}},
            r"\[tuning\] chooses one for every arm \(overrides\): got learner.lr = 0.1",
        ),
    ],
)
def test_a_setting_that_the_comparison_gives_itself_is_refused_and_not_left_out(changes, message):
    tuning = {"rates": [1e-3, 2e-3, 3e-3], "seeds": [9]}
    with pytest.raises(ConfigError, match=message):
        config(tuning=tuning, **changes).checked()
    if "learner" in changes.get("overrides", {}):
        config(**changes).checked()


def test_a_wrong_key_in_an_arm_names_the_arm():
    with pytest.raises(ConfigError, match="arm 'b'"):
        config(arms=[ARMS[0], {"name": "b", "set": {"kk": 5}}]).checked()


def test_a_changed_setting_makes_another_cell():
    def cell(k):
        return Cell("x", "live", "a", 0, None, EMBEDDED, {"k": k}, 4)

    assert cell(5).digest == cell(5).digest
    assert cell(5).digest != cell(6).digest


def test_other_prompts_or_weights_under_the_same_names_make_another_cell(tmp_path):
    data, student = tmp_path / "prompts.jsonl", tmp_path / "student"
    student.mkdir()
    base = tmp_path / "run.toml"
    base.write_text(f"""
        [student]
        model = {str(student)!r}
        [teacher]
        url = "http://127.0.0.1:1"
        [data]
        path = {str(data)!r}
    """)

    def digest(prompts, weights):
        data.write_text(prompts)
        (student / "model.safetensors").write_bytes(weights)
        told = config(base=str(base))
        return _build_cell(told, told.arms[0], 0, None, "live").digest

    before = digest("{}", b"one")
    assert digest("{}", b"one") == before
    assert len({before, digest("{ }", b"one"), digest("{}", b"two")}) == 3


def test_a_custom_objective_is_an_arm_and_another_source_of_it_makes_another_cell(tmp_path):
    file = tmp_path / "losses.py"

    def digest(source):
        file.write_text(source)
        made = from_runs([], parse_grid([f"objective.kind=gjs,{file}:mine"]), [0])
        assert [arm.set["objective"]["kind"] for arm in made.arms] == ["gjs", f"{file}:mine"]
        assert made.arms[1].display_name == f"kind={file}:mine"
        return [_build_cell(made, arm, 0, None, "live").digest for arm in made.arms]

    first, same = (digest("def mine(view):\n    return -view.logp_new\n") for _ in range(2))
    other = digest("def mine(view):\n    return -2 * view.logp_new\n")
    assert first == same
    assert (other[0], other[1] != first[1]) == (first[0], True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("losses.py:absent", r"objective.kind names no function .*got 'absent'"),
        ("nowhere.py:mine", r"objective.kind cannot be imported .*no file nowhere.py"),
        ("losses.py:greedy", "losses.py:greedy"),
    ],
)
def test_a_custom_objective_that_cannot_be_called_is_refused_before_any_cell_runs(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("losses.py").write_text("def greedy(view, beta):\n    return -view.logp_new\n")
    with pytest.raises(ConfigError, match=message):
        from_runs([], parse_grid([f"objective.kind=gjs,{name}"]), [0])


def test_a_replay_of_other_rollouts_is_another_cell_though_its_own_arm_is_as_it_was():
    def replays(**changes):
        told = config(replay=True, arms=[{**ARMS[0], "set": {**ARMS[0]["set"], **changes}}, ARMS[1]])
        live = _build_cell(told, told.arms[0], 0, None, "live")
        return [_build_cell(told, arm, 0, None, "replay", live_digests={live.id: live.digest}) for arm in told.arms]

    (_, before), (_, same), (_, after) = replays(), replays(), replays(seed=1, steps=9)
    assert (before.values, before.digest) == (after.values, same.digest)
    assert before.digest != after.digest


def finish(cells, cell, text):
    """A cell that ended, as a worker leaves it."""
    folder = _prepare_cell_folder(cells, cell)
    result = {"id": cell.id, "digest": cell.digest, "status": "done", "said": text}
    (folder / "result.json").write_text(json.dumps(result))


def test_a_finished_cell_whose_place_is_taken_is_kept_and_an_unfinished_one_begins_again(tmp_path):
    cells = tmp_path / "cells"
    old, new = (Cell("live-a-seed0", "live", "a", 0, None, EMBEDDED, {"steps": steps}, 4) for steps in (200, 20))
    finish(cells, old, "a night's work")
    assert (is_superseded(cells, new), is_superseded(cells, old)) == (True, False)
    (_prepare_cell_folder(cells, new) / "metrics.jsonl").write_text("half")
    kept = json.loads((tmp_path / FORMER / f"{old.id}-{old.digest}" / "result.json").read_text())
    assert kept["said"] == "a night's work"
    assert not is_superseded(cells, old)
    finish(cells, new, "done")
    assert [path.name for path in (cells / new.id).iterdir()] == ["result.json"]
    assert read_finished(cells, new)["said"] == "done"
    assert [path.name for path in (tmp_path / FORMER).iterdir()] == [f"{old.id}-{old.digest}"]


def test_one_comparison_has_its_folder_for_itself(tmp_path):
    told, out = config(), tmp_path / "out"
    with lock_folder(out), pytest.raises(ConfigError, match="another process is at work"):
        compare(told, out)
    assert [path.name for path in out.iterdir()] == [".lock"]


class PlantedRuns:
    """Stands in for the worker processes: a cell's curve falls most at its arm's planted best rate."""

    def __init__(self, best):
        self.best, self.trials = best, []

    def finish(self, stage, cells):
        self.trials.append({(cell.arm, cell.lr, cell.seed) for cell in cells})
        return {
            cell.id: {
                "status": "done",
                "evals": [
                    {"tokens": 0, "reverse_kl": 1.0},
                    {"tokens": 9, "reverse_kl": abs(cell.lr - self.best[cell.arm]) / cell.lr},
                ],
            }
            for cell in cells
        }


TUNED = {"tuning": {"rates": [1e-4, 3e-4, 9e-4], "seeds": [8, 9], "extensions": 1}}


def test_each_arm_gets_its_own_rate_and_all_arms_as_many_trials():
    runs = PlantedRuns({"a": 3e-4, "b": 9e-4})
    rates, tables = _tune_rates(config(**TUNED), runs)
    assert rates == {"a": 3e-4, "b": 9e-4}
    assert tables["b"]["edge"] == ""  # the grid grew past 9e-4 and the best stayed inside
    for trials in runs.trials:
        per_arm = [{(lr, seed) for arm, lr, seed in trials if arm == name} for name in ("a", "b")]
        assert per_arm[0] == per_arm[1]
    assert len(runs.trials) == 2


def test_a_best_rate_that_stays_at_the_edge_is_marked():
    _, tables = _tune_rates(config(**TUNED), PlantedRuns({"a": 3e-4, "b": 1.0}))
    assert (tables["a"]["edge"], tables["b"]["edge"]) == ("", "high")
