"""One recorded run, replayed under every objective there is; and what else of a live run a replay repeats."""

import asyncio
import json
import math
from typing import get_args

import pytest

from tests.compose.test_replay import NOWHERE, run_config, same, steps_of
from tests.engine.pieces import model_folder
from topkd.compose.dry_run import dry_run
from topkd.compose.replay import replay
from topkd.compose.train import train
from topkd.engine.config.objectives import Objective
from topkd.engine.loop.metrics import read_metrics
from topkd.offline import ScoreStore
from topkd.offline.store.records import ROLLOUT
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import CacheMissError, ConfigError, TopkdError

KINDS = sorted(member.model_fields["kind"].default for member in get_args(get_args(Objective)[0]))
FROM_A_TEACHER = [kind for kind in KINDS if kind not in {"sft", "custom"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    data = root / "prompts.jsonl"
    rows = [{"prompt_ids": [5 + i, 9], "id": i, "completion_ids": [40 + i, 41, 42], "answer": "x"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model_folder(root / "student", seed=1), model_folder(root / "teacher", seed=2), data


@pytest.fixture(scope="module")
def server(folders):
    config = ServeConfig(model=str(folders[1]), served_model_name="teacher", port=0, max_logprobs=20, device="cpu")
    with ServerProcess(config) as running:
        yield running


@pytest.fixture(scope="module")
def cache(folders, server, tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded")
    asyncio.run(train(run_config(folders, server.url, root / "cache"), root / "live"))
    return root / "cache"


def test_the_list_of_objectives_is_complete():
    assert {"topk_pg", "gjs", "scalar_kl", "fkl", "rkl", "gjs_direct", "taid", "entropy_aware", "eopd", "kd"} <= set(
        FROM_A_TEACHER
    )


@pytest.mark.parametrize("kind", FROM_A_TEACHER)
async def test_every_objective_learns_from_the_same_recorded_rollouts(folders, cache, tmp_path, kind):
    chosen = run_config(folders, NOWHERE, objective={"kind": kind}, steps=3)
    await replay(chosen, tmp_path / "again", cache=cache)
    records = steps_of(tmp_path / "again")
    assert {record["divergence_mode"] for record in records} == {kind}
    assert [record["samples"] for record in records] == [16, 16, 16]
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records)
    shuffled = run_config(folders, NOWHERE, objective={"kind": kind}, steps=2, replay={"order": "shuffled"})
    await replay(shuffled, tmp_path / "shuffled", cache=cache)
    assert [record["samples"] for record in steps_of(tmp_path / "shuffled")] == [16, 16]


async def test_ppo_replays_a_recorded_run(folders, cache, tmp_path):
    learner = {"lr": 3e-3, "importance": {"kind": "ppo"}}
    await replay(run_config(folders, NOWHERE, objective={"kind": "gjs"}, learner=learner), tmp_path / "r", cache=cache)
    assert len(steps_of(tmp_path / "r")) == 4


async def test_no_distance_is_told_to_the_policy_of_a_run_that_learnt_something_else(folders, cache, tmp_path):
    live = steps_of(cache.parent / "live")
    for kind, told in (("topk_pg", True), ("fkl", False)):
        await replay(run_config(folders, NOWHERE, objective={"kind": kind}), tmp_path / kind, cache=cache)
        records = steps_of(tmp_path / kind)
        for name in ("staleness", "mismatch_kl"):
            assert [record[name] for record in records] == ([r[name] for r in live] if told else [None] * len(live))
        assert [record["rollout_versions"] for record in records] == [record["rollout_versions"] for record in live]


async def test_a_live_run_of_a_direct_loss_replays_as_itself(folders, server, tmp_path):
    changes = {"objective": {"kind": "taid"}, "steps": 3}
    await train(run_config(folders, server.url, tmp_path / "cache", **changes), tmp_path / "live")
    await replay(run_config(folders, NOWHERE, **changes), tmp_path / "again", cache=tmp_path / "cache")
    same(steps_of(tmp_path / "live"), steps_of(tmp_path / "again"))


async def test_a_mixture_with_the_datas_completions_replays_as_itself(folders, server, tmp_path):
    changes = {"objective": {"kind": "gjs_direct"}, "on_policy_fraction": 0.5, "data_loss": "objective", "steps": 3}
    await train(run_config(folders, server.url, tmp_path / "cache", **changes), tmp_path / "live")
    await replay(run_config(folders, NOWHERE, **changes), tmp_path / "again", cache=tmp_path / "cache")
    same(steps_of(tmp_path / "live"), steps_of(tmp_path / "again"))


async def test_scores_of_the_datas_completions_alone_are_replayed_without_a_rollout_in_the_cache(
    folders, server, tmp_path
):
    """What ``topkd cache import`` leaves: it has nobody's rollouts to bring."""
    changes = {"objective": {"kind": "kd"}, "on_policy_fraction": 0.0, "data_loss": "objective", "steps": 3}
    await train(run_config(folders, server.url, tmp_path / "cache", **changes), tmp_path / "live")
    with ScoreStore(tmp_path / "cache") as store:
        assert not [*store.records(kinds=(ROLLOUT,))]
    offline = run_config(folders, NOWHERE, **changes)
    await replay(offline, tmp_path / "again", cache=tmp_path / "cache")
    same(steps_of(tmp_path / "live"), steps_of(tmp_path / "again"))
    found = await dry_run(offline, served=False, cache=tmp_path / "cache")
    assert found.problems == []
    assert any("has scores, for the completions of" in note for note in found.notes)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt_ids": [5, 9], "completion_ids": [3, 4, 5]}) + "\n")
    with pytest.raises(TopkdError, match="does not have the score"):
        await replay(
            offline.model_copy(update={"data": offline.data.model_copy(update={"path": str(other)})}),
            tmp_path / "none", cache=tmp_path / "cache",
        )  # fmt: skip
    with pytest.raises(CacheMissError, match=r"holds no rollouts .*on_policy_fraction = 0, data_loss"):
        await replay(
            offline.model_copy(update={"on_policy_fraction": 1.0}), tmp_path / "none", cache=tmp_path / "cache"
        )


async def test_evaluation_with_a_scorer_goes_on_without_a_server(folders, cache, tmp_path):
    measured = {"path": str(folders[2]), "every": 2, "scorer": "exact_match", "max_tokens": 4, "ceiling": True}
    chosen = run_config(folders, NOWHERE, eval=measured | {"teacher": str(folders[1])})
    await replay(chosen, tmp_path / "again", cache=cache)
    evals = read_metrics(tmp_path / "again" / "metrics.jsonl", "eval")
    fixed = [record for record in evals if record["prefixes"] == "fixed"]
    assert [record["step"] for record in fixed] == [0, 2, 4]
    assert fixed[2]["reverse_kl"] < fixed[0]["reverse_kl"], "it learnt from the cache alone"


async def test_a_list_of_the_students_choice_is_not_in_a_cache(folders, cache, tmp_path):
    chosen = run_config(folders, NOWHERE, objective={"kind": "topk_pg", "support": "student"})
    with pytest.raises(ConfigError, match="needs a teacher that scores chosen ids: got a cache"):
        await replay(chosen, tmp_path / "again", cache=cache)
