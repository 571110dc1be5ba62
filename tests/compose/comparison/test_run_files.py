"""Comparisons of run files: each cell is a run of its own, measured on the prefixes that all cells share."""

import json

import pytest

from tests.fakes.tinymodels import make_tiny_model
from topkd.compose.compare import compare
from topkd.compose.comparison.cell import group_by_step, summarize_cell
from topkd.compose.comparison.config import from_runs, parse_grid
from topkd.compose.comparison.summary import summarize_curve
from topkd.engine import EngineConfig
from topkd.engine.loop.metrics import read_metrics


def test_evaluations_on_other_prefixes_are_no_points_of_the_curve():
    evals = [
        {"step": 0, "prefixes": "fixed", "reverse_kl": 2.0},
        {"step": 0, "prefixes": "fresh", "reverse_kl": 2.0},
        {"step": 4, "prefixes": "fixed", "reverse_kl": 1.0},
        {"step": 4, "prefixes": "fresh", "reverse_kl": 9.0},
    ]
    first, last = group_by_step(evals)
    assert (first["reverse_kl"], last["reverse_kl"], last["fresh"]["reverse_kl"]) == (2.0, 1.0, 9.0)
    facts = summarize_curve([first | {"tokens": 0}, last | {"tokens": 8}], "reverse_kl", 0.5)
    assert (facts["area"], facts["final"]) == (0.75, 1.0)


@pytest.mark.parametrize(
    ("objective", "each"),
    [
        ({"kind": "gjs"}, 1),
        ({"kind": "gjs", "baseline": "value"}, 6),
        ({"kind": "scalar_kl", "gamma": 0.5}, 6),
        ({"kind": "topk_pg"}, 6),
    ],
)
def test_an_arm_pays_for_the_lists_that_its_objective_looks_at(objective, each):
    step = {"tokens": 8, "completion_tokens": 10, "samples": 1, "truncated": 0, "skipped": "", "lost": {}}
    cell = summarize_cell(EngineConfig.model_validate({"k": 5, "objective": objective}), [step], [])
    assert (cell["teacher_entries"], cell["teacher_bytes"]) == (10 * each, 80 * each)


def run_file(tmp_path):
    for name, seed in (("student", 1), ("teacher", 2)):
        make_tiny_model(tmp_path / name, seed=seed, vocab=512, hidden=32)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"def f{i}(x):"}) + "\n" for i in range(4)))
    (tmp_path / "run.toml").write_text(
        f"""steps = 2
eval_every = 1
learner = {{ lr = 1e-2 }}
rollout = {{ prompts_per_step = 2, samples_per_prompt = 1, max_completion_tokens = 6 }}
student = {{ model = "{tmp_path / "student"}", device = "cpu" }}
teacher = {{ kind = "local", model = "{tmp_path / "teacher"}" }}
data = {{ path = "{data}" }}
eval = {{ path = "{data}", max_tokens = 6 }}
"""
    )
    return tmp_path / "run.toml"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_arms_of_a_run_file_are_judged_by_their_run_logs_fixed_prefixes(tmp_path):
    config = from_runs([run_file(tmp_path)], parse_grid(["k=2,9"]), [0])
    done = compare(config.model_copy(update={"workers": 1}), tmp_path / "out")
    assert done.complete
    for row in done.summary["live"]["arms"]:
        run_log = tmp_path / "out" / "cells" / f"live-{row['arm']}-seed0" / "metrics.jsonl"
        fixed = [one["reverse_kl"] for one in read_metrics(run_log, "eval") if one["prefixes"] == "fixed"]
        fresh = [one["reverse_kl"] for one in read_metrics(run_log, "eval") if one["prefixes"] == "fresh"]
        assert len(fixed) == 3
        assert (row["seeds"]["0"]["first"], row["final"]["mean"]) == (fixed[0], fixed[-1])
        assert row["seeds"]["0"]["fresh_reverse_kl"] == fresh[-1] != fixed[-1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_custom_objective_trains_as_an_arm_beside_a_built_in_one(tmp_path):
    (tmp_path / "losses.py").write_text("def mine(view):\n    return -view.logp_new\n")
    config = from_runs([run_file(tmp_path)], parse_grid([f"objective.kind=gjs,{tmp_path / 'losses.py'}:mine"]), [0])
    done = compare(config.model_copy(update={"workers": 1}), tmp_path / "out")
    assert done.complete, done.summary["failed"]
    theirs = done.summary["live"]["arms"][1]
    values = json.loads((tmp_path / "out" / "cells" / f"live-{theirs['arm']}-seed0" / "config.json").read_text())
    assert values["objective"]["kind"] == f"{tmp_path / 'losses.py'}:mine"
    assert theirs["final"]["mean"] != done.summary["live"]["arms"][0]["final"]["mean"]
