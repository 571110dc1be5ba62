"""What a live run keeps, a replay repeats to the bit: no server, any objective, and a miss is an error."""

import json
import shutil
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.engine.pieces import model_folder
from topkd.compose.cache.identity import list_identities
from topkd.compose.cache.rollouts import RecordedSampler, build_policy_identity
from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.prompts import load_prompts
from topkd.compose.progress import Progress
from topkd.compose.replay import replay
from topkd.compose.run.runner import load_student
from topkd.compose.train import train
from topkd.engine.loop.metrics import TRAFFIC, drop_timings, read_metrics
from topkd.engine.loop.prompts import PromptRow
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.store.records import ROLLOUT
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk import Rollout, SamplingParams
from topkd.topk.errors import CacheMissError, ConfigError, DataError

CLOCKS = {"time", "t", "at", "seconds", *TRAFFIC}
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    data = root / "prompts.jsonl"
    # Two rows hold one prompt: a batch may draw it twice, and must draw it differently.
    prompts = [[5 + i, 9] for i in range(7)] + [[5, 9]]
    data.write_text("".join(json.dumps({"prompt_ids": ids, "id": i}) + "\n" for i, ids in enumerate(prompts)))
    return model_folder(root / "student", seed=1), model_folder(root / "teacher", seed=2), data


@pytest.fixture(scope="module")
def server(folders):
    config = ServeConfig(model=str(folders[1]), served_model_name="teacher", port=0, max_logprobs=20, device="cpu")
    with ServerProcess(config) as running:
        yield running


def run_config(folders, url, cache=None, **changes):
    values = {
        "steps": 4,
        "seed": 1,
        "student": {"model": str(folders[0]), "device": "cpu"},
        "teacher": {"url": url},
        "data": {"path": str(folders[2])},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 2, "max_completion_tokens": 6},
        "learner": {"lr": 3e-3},
        "cache": {"path": str(cache)} if cache else None,
    }
    return RunConfig.model_validate(values | changes)


def sent_tokens(server):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{server.url}/metrics") as reply:
        text = reply.read().decode()
    return float(next(line for line in text.splitlines() if line.startswith("vllm:prompt_tokens_total")).split()[-1])


def steps_of(run):
    records = read_metrics(run / "metrics.jsonl", "step")
    return [{key: value for key, value in drop_timings(record).items() if key not in CLOCKS} for record in records]


def same(left, right):
    assert json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)  # NaN equals NaN here


def weights(run):
    return load_file(next((run / "student").glob("*.safetensors")))


@pytest.fixture(scope="module")
def recorded(folders, server, tmp_path_factory):
    """A live topk_pg run and its cache."""
    import asyncio

    root = tmp_path_factory.mktemp("recorded")
    asyncio.run(train(run_config(folders, server.url, root / "cache"), root / "live"))
    return root


@pytest.mark.parametrize(
    ("kind", "codec"), [("topk_pg", "packed"), ("gjs", "packed"), ("scalar_kl", "packed"), ("topk_pg", "raw")]
)
async def test_a_live_run_replayed_from_its_own_cache_is_the_same_run(folders, server, tmp_path, kind, codec):
    objective = {"kind": kind}
    live = run_config(folders, server.url, tmp_path / "cache", objective=objective)
    live = live.model_copy(update={"cache": live.cache.model_copy(update={"codec": codec})})
    await train(live, tmp_path / "live")
    offline = run_config(folders, NOWHERE, objective=objective)
    await replay(offline, tmp_path / "again", cache=tmp_path / "cache")
    same(steps_of(tmp_path / "live"), steps_of(tmp_path / "again"))
    was, now = weights(tmp_path / "live"), weights(tmp_path / "again")
    assert was.keys() == now.keys()
    assert all(np.array_equal(was[name], now[name]) for name in was)
    assert steps_of(tmp_path / "live")[-1]["tokens"] > 8 * 2


async def test_caching_changes_nothing_but_fp16_rounding(folders, server, recorded, tmp_path):
    await train(run_config(folders, server.url), tmp_path / "plain")
    plain, cached = steps_of(tmp_path / "plain"), steps_of(recorded / "live")
    assert [record["tokens"] for record in plain] == [record["tokens"] for record in cached]
    # The first step's rollouts and realised logprobs are exact in both.
    assert plain[0]["kl_k1"] == pytest.approx(cached[0]["kl_k1"], rel=2e-3)
    assert plain[0]["loss"] == pytest.approx(cached[0]["loss"], rel=2e-2, abs=1e-4)


async def test_another_objective_trains_on_the_recorded_rollouts_with_importance_ratios(folders, recorded, tmp_path):
    await replay(run_config(folders, NOWHERE, objective={"kind": "gjs"}), tmp_path / "gjs", cache=recorded / "cache")
    live, other = steps_of(recorded / "live"), steps_of(tmp_path / "gjs")
    assert [record["tokens"] for record in other] == [record["tokens"] for record in live]
    assert {record["divergence_mode"] for record in other} == {"gjs"}
    # The first batch is on-policy for both; later ones were sampled from weights that this run never had.
    assert other[0]["ratio_mean"] == pytest.approx(1.0, abs=1e-3)
    assert abs(other[-1]["ratio_mean"] - 1.0) > 1e-4
    assert other[-1]["behavior_kl_k3"] != live[-1]["behavior_kl_k3"]


async def test_the_same_live_run_again_asks_the_server_nothing(folders, server, recorded, tmp_path):
    shutil.copytree(recorded / "cache", tmp_path / "cache")
    before = sent_tokens(server)
    await train(run_config(folders, server.url, tmp_path / "cache"), tmp_path / "again")
    assert sent_tokens(server) - before < 64  # the questions at the start, and no score
    same(steps_of(tmp_path / "again"), steps_of(recorded / "live"))
    (account,) = [
        event for event in read_metrics(tmp_path / "again" / "metrics.jsonl", "event") if event["event"] == "cached"
    ]
    assert account["rollouts"]["hits"] == 4
    assert account["rollouts"]["misses"] == account["scores"][""]["misses"] == 0
    assert account["scores"][""]["saved_tokens"] > 0


async def test_another_live_run_in_the_same_cache_samples_for_itself(folders, server, recorded, tmp_path):
    shutil.copytree(recorded / "cache", tmp_path / "cache")
    other = run_config(folders, server.url, tmp_path / "cache", objective={"kind": "gjs"})
    await train(other, tmp_path / "gjs")
    assert len(list_identities(tmp_path / "cache", ROLLOUT)) == 2
    with pytest.raises(ConfigError, match="several recorded runs") as caught:
        await replay(run_config(folders, NOWHERE), tmp_path / "which", cache=tmp_path / "cache")
    revisions = [policy.revision for policy in list_identities(tmp_path / "cache", ROLLOUT)]
    assert all(revision in str(caught.value) for revision in revisions)
    (first,) = list_identities(recorded / "cache", ROLLOUT)
    chosen = run_config(folders, NOWHERE, replay={"policy": first.revision})
    await replay(chosen, tmp_path / "first", cache=tmp_path / "cache")
    same(steps_of(tmp_path / "first"), steps_of(recorded / "live"))


async def test_a_shuffled_replay_goes_through_every_completion_once_an_epoch(folders, recorded, tmp_path):
    seen = []

    class Watch(Progress):
        def note(self, text):
            seen.append(text)

    changes = {
        "replay": {"order": "shuffled"},
        "steps": 16,
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 1},
    }
    config = run_config(folders, NOWHERE, **changes)
    await replay(config, tmp_path / "one", Watch(), cache=recorded / "cache")
    await replay(config, tmp_path / "two", cache=recorded / "cache")
    await replay(config.model_copy(update={"seed": 7}), tmp_path / "other", cache=recorded / "cache")
    assert "64 recorded completions to draw from" in seen
    records = steps_of(tmp_path / "one")
    total = sum(record["tokens"] for record in steps_of(recorded / "live"))
    assert sum(record["tokens"] for record in records[:8]) == total
    assert sum(record["tokens"] for record in records[8:]) == total
    same(records, steps_of(tmp_path / "two"))
    # drawn from a recorded run: a distance in versions to this learner is not known, and is not made up
    assert {record["staleness"] for record in records} == {None}
    assert {version for r in records for version in r["rollout_versions"]} == {"0", "1", "2"}
    assert [r["loss"] for r in records] != [r["loss"] for r in steps_of(tmp_path / "other")]


async def test_every_miss_is_one_clear_error(folders, recorded, tmp_path):
    cache = recorded / "cache"
    cases = [
        ({"k": 21}, CacheMissError, "no scores with K entries"),
        ({"steps": 5}, CacheMissError, "no such rollouts"),
        ({"seed": 2}, CacheMissError, "no such rollouts"),
        ({"teacher": {"url": NOWHERE, "model": "nobody"}}, CacheMissError, "'nobody'"),
        ({"teacher": {"url": NOWHERE, "revision": "v2"}}, CacheMissError, "no scores of this teacher"),
        ({"k": 21, "replay": {"order": "shuffled"}}, CacheMissError, "at most 20 entries, expected K = 21; set k = 20"),
        ({"replay": {"policy": "run-0"}}, ConfigError, "run-0"),
    ]
    for number, (changes, error, words) in enumerate(cases):
        with pytest.raises(error) as caught:
            await replay(run_config(folders, NOWHERE, **changes), tmp_path / str(number), cache=cache)
        assert words in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no cache to replay"):
        await replay(run_config(folders, NOWHERE), tmp_path / "none")


async def test_a_single_missing_score_is_an_error_unless_it_may_be_lost_and_then_it_is_counted(
    folders, recorded, tmp_path
):
    from topkd.offline.store.tables import read_identities

    names = read_identities(recorded / "cache")
    with ScoreStore(recorded / "cache") as whole, ScoreStore(tmp_path / "holed", mode="a") as holed:
        for number, record in enumerate(whole.records()):
            if number != 3:
                holed.put(names[record.header.tag], *record.score(), asked=record.header.asked)
        for record in whole.records(kinds=(ROLLOUT,)):
            rollouts = record.rollouts()
            holed.put_rollouts(names[record.header.tag], rollouts[0].prompt_ids, rollouts, rollouts[0].sampling)
    with pytest.raises(CacheMissError, match="no record of these ids"):
        await replay(run_config(folders, NOWHERE), tmp_path / "strict", cache=tmp_path / "holed")
    lenient = run_config(folders, NOWHERE, replay={"missing": "lose"})
    await replay(lenient, tmp_path / "lenient", cache=tmp_path / "holed")
    records = steps_of(tmp_path / "lenient")
    assert [record["lost"] for record in records if record["lost"]] == [{"CacheMissError": 1}]
    assert sum(record["samples"] for record in records) == 4 * 16 - 1


async def test_one_prompt_twice_in_a_batch_keeps_two_sets_of_rollouts(tmp_path):
    class Numbered:
        def __init__(self):
            self.calls = 0

        async def sample(self, prompt_ids, n, params, *, k=0):
            raise AssertionError("a batch sampler is asked for batches")

        async def sample_batch(self, prompts, n, params, *, k=0):
            self.calls += 1
            return [
                [Rollout(np.array(p), np.array([10 * place + i]), np.float32([-1.5]), "stop", params) for i in range(n)]
                for place, p in enumerate(prompts)
            ]

    params, policy, prompts = SamplingParams(max_tokens=4, seed=3), TeacherIdentity("p"), [[1, 2], [1, 2], [3]]
    live = Numbered()
    with ScoreStore(tmp_path / "c", mode="a") as store:
        drawn = await RecordedSampler(live, store, policy).sample_batch(prompts, 2, params)
        again = await RecordedSampler(live, store, policy).sample_batch(prompts, 2, params)
        with pytest.raises(ConfigError, match="no seed"):
            await RecordedSampler(live, store, policy).sample_batch(prompts, 2, SamplingParams(max_tokens=4))
    assert live.calls == 1
    with ScoreStore(tmp_path / "c") as store:
        replayed = await RecordedSampler(None, store, policy).sample_batch(prompts, 2, params)
    for rollouts in (drawn, again, replayed):
        assert [[int(r.completion_ids[0]) for r in group] for group in rollouts] == [[0, 1], [10, 11], [20, 21]]


def test_runs_whose_rows_have_other_teachers_are_other_policies(folders):
    two = RunConfig.model_validate(
        {**run_config(folders, NOWHERE).model_dump(exclude={"teacher"}),
         "teachers": {"a": {"url": NOWHERE}, "b": {"url": NOWHERE}}}
    )  # fmt: skip
    student = SimpleNamespace(model=torch.nn.Linear(1, 1))
    teachers = {name: TeacherIdentity(name) for name in ("a", "b")}
    revisions = {
        build_policy_identity(
            two, student, [PromptRow([5, 9], [5, 9], names[0]), PromptRow([6], [6], names[1])], teachers
        )
        for names in (("a", "b"), ("b", "a"), ("a", "b"))
    }
    assert len(revisions) == 2


def test_an_id_past_the_students_vocabulary_is_refused_by_its_row(folders, tmp_path):
    data = tmp_path / "far.jsonl"
    data.write_text('{"prompt_ids": [5, 9]}\n{"prompt_ids": [5, 300], "id": "far"}\n')
    config = run_config(folders, NOWHERE, data={"path": str(data)})
    with pytest.raises(DataError, match=r"the student does not have \(.*far.jsonl, far\): got 300, expected below 300"):
        load_student(config, load_prompts(config, Progress()))
