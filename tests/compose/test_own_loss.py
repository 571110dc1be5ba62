"""An objective of one's own, given to ``train``: everything the run writes down is of it, not of the config's."""

import json

from tests.engine.pieces import model_folder
from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.engine.loop.metrics import read_metrics


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
    assert step["divergence_mode"] == "custom: likelihood"
    assert {rollout["objective"] for rollout in shown} == {"custom: likelihood"}
    assert {token["advantage"] for rollout in shown for token in rollout["tokens"]} == {None}
