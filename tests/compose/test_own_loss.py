"""A custom objective, given to ``train`` or named by the config: everything the run records is of it."""

import json
import re

import pytest

from tests.engine.pieces import model_folder
from topkd.compose.config.run_config import RunConfig
from topkd.compose.dry_run import dry_run
from topkd.compose.replay import replay
from topkd.compose.train import train
from topkd.engine.loop.metrics import read_metrics
from topkd.topk.errors import ConfigError

LIKELIHOOD = f"{__name__}:likelihood"


def likelihood(view):
    return -view.logp_new


def unlikelihood(view):
    return view.logp_new


def run_config(tmp_path, **more):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt_ids": [5 + i, 9]}) + "\n" for i in range(4)))
    return RunConfig.model_validate(
        {
            "steps": 1,
            "student": {"model": str(model_folder(tmp_path / "student", seed=1)), "device": "cpu"},
            "teacher": {"kind": "local", "model": str(model_folder(tmp_path / "teacher", seed=2))},
            "data": {"path": str(data)},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 1, "max_completion_tokens": 3},
            **more,
        }
    )


async def awaited(view):
    return -view.logp_new


def two(view, beta):
    return -view.logp_new


async def test_a_run_takes_no_rollouts_that_another_loss_drew_in_the_same_cache(tmp_path):
    config = run_config(tmp_path, steps=2, max_staleness=0, cache={"path": str(tmp_path / "cache")})
    kept = []
    for number, loss in enumerate((None, likelihood, unlikelihood, likelihood)):
        await train(config, tmp_path / f"run{number}", loss=loss)
        events = read_metrics(tmp_path / f"run{number}" / "metrics.jsonl", "event")
        kept.append(next(event["policy"] for event in events if event["event"] == "cached"))
    assert len(set(kept[:3])) == 3
    assert kept[3] == kept[1]


async def test_the_run_log_and_the_recorded_rollouts_name_the_loss_that_trained(tmp_path):
    config = run_config(tmp_path)
    await train(config, tmp_path / "run", loss=likelihood)
    (step,) = read_metrics(tmp_path / "run" / "metrics.jsonl", "step")
    shown = [json.loads(line) for line in (tmp_path / "run" / "tokens.jsonl").read_text().splitlines()]
    assert step["divergence_mode"] == LIKELIHOOD
    assert {rollout["objective"] for rollout in shown} == {LIKELIHOOD}
    assert {token["advantage"] for rollout in shown for token in rollout["tokens"]} == {None}
    assert step["objective"]["kind"] == LIKELIHOOD
    assert json.loads((tmp_path / "run" / "config.json").read_text())["objective"]["kind"] == LIKELIHOOD


def steps_of(folder):
    return [
        {key: value for key, value in record.items() if not key.endswith("_s")}
        for record in read_metrics(folder / "metrics.jsonl", "step")
    ]


async def test_a_function_that_the_config_names_trains_as_the_one_given_as_an_argument(tmp_path):
    await train(run_config(tmp_path), tmp_path / "given", loss=likelihood)
    await train(run_config(tmp_path, objective={"kind": LIKELIHOOD}), tmp_path / "named")
    assert steps_of(tmp_path / "named") == steps_of(tmp_path / "given")
    assert steps_of(tmp_path / "named")[0]["divergence_mode"] == LIKELIHOOD


async def test_a_function_of_a_file_trains_replays_and_goes_on(tmp_path):
    file = tmp_path / "losses.py"
    file.write_text("def own(view):\n    assert view.logp_at_ids.shape[1] == 0\n    return -view.logp_new\n")
    objective = {"kind": f"{file}:own", "reads_list": False}
    cache = {"path": str(tmp_path / "cache")}
    config = run_config(tmp_path, objective=objective, cache=cache)
    await train(config, tmp_path / "run")
    await replay(config, tmp_path / "again")
    (first,), (again,) = steps_of(tmp_path / "run"), steps_of(tmp_path / "again")
    assert (again["loss"], again["divergence_mode"]) == (first["loss"], f"{file}:own")
    longer = run_config(tmp_path, objective=objective, cache=cache, steps=2)
    result = await train(longer, tmp_path / "run", resume=True)
    assert [step["step"] for step in result.steps] == [1, 2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            f"{__name__}:two",
            r"a loss function must take one argument \(.*:two\): got \(view, beta\) .*'beta'.*expected a function of",
        ),
        (f"{__name__}:awaited", r"a loss function must not be async \(.*:awaited\): got async def"),
        (f"{__name__}:nothing", r"objective.kind names no function \(.*\): got 'nothing'"),
        ("no.such.module:loss", r"objective.kind cannot be imported \(no.such.module\)"),
        ("nowhere.py:loss", r"objective.kind cannot be imported \(nowhere.py\).*no file nowhere.py"),
    ],
)
async def test_a_function_that_cannot_be_a_loss_is_refused_before_the_run_begins(tmp_path, name, words):
    config = run_config(tmp_path, objective={"kind": name})
    with pytest.raises(ConfigError, match=words):
        await train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert any(re.search(words, problem) for problem in (await dry_run(config)).problems)


async def test_a_loss_in_place_of_sft_is_refused(tmp_path):
    config = run_config(tmp_path, objective={"kind": "sft"})
    with pytest.raises(ConfigError, match="a custom loss needs a teacher"):
        await train(config, tmp_path / "run", loss=likelihood)


async def test_a_dry_run_shows_the_function_as_the_config_names_it(tmp_path):
    settings = (await dry_run(run_config(tmp_path, objective={"kind": LIKELIHOOD}))).settings
    shown = {key: value for key, value, _ in settings if key.startswith("objective.")}
    assert shown["objective.kind"] == LIKELIHOOD
    assert "objective.function" not in shown


def test_a_custom_objective_says_what_it_needs(tmp_path):
    objective = run_config(tmp_path, objective={"kind": LIKELIHOOD}).objective
    direct = run_config(tmp_path, objective={"kind": LIKELIHOOD, "reads_sampled_token": False}, data_loss="objective")
    assert (objective.name, objective.needs_list, objective.needs_behavior) == (LIKELIHOOD, True, True)
    assert not direct.objective.needs_behavior
    with pytest.raises(ValueError, match="completions from the data do not have"):
        run_config(tmp_path, objective={"kind": LIKELIHOOD}, data_loss="objective")
    assert RunConfig.model_validate(direct.model_dump()) == direct
