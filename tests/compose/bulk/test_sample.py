"""A teacher's own completions: drawn once, kept with its logprobs, replayed by objectives that may learn from them."""

import asyncio
import json

import numpy as np
import pytest

from tests.compose.bulk.chat_server import AMBIGUOUS, LOGP, ChatServer
from tests.engine.pieces import model_folder
from topkd.compose.bulk.config import SampleConfig
from topkd.compose.bulk.job import SpendingLimit
from topkd.compose.cache.identity import build_sampled_policy, check_off_policy, is_off_policy
from topkd.compose.config.run_config import RunConfig
from topkd.compose.replay import replay
from topkd.compose.sample import SampleJob, sample
from topkd.engine.loop.metrics import read_metrics
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.store.records import ROLLOUT
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import CacheError, ConfigError, ResponseError

CHATTY = TeacherIdentity("chatty")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "student", seed=1)


@pytest.fixture(scope="module")
def tokenizer(student):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(student)


@pytest.fixture
def server(tokenizer):
    def count(messages):
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    with ChatServer(count) as running:
        yield running


def prompts(path, texts):
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(server, student, tmp_path):
    data = prompts(tmp_path / "prompts.jsonl", [f"say {i}" for i in range(12)])

    def make(**changes):
        values = {"data": data, "out": tmp_path / "cache", "teacher": server.url, "tokenizer": str(student),
                  "k": 5, "n": 3, "max_new_tokens": 6}  # fmt: skip
        return SampleConfig(**(values | changes))

    return make


async def test_completions_and_their_lists_are_kept_with_the_apis_own_logprobs(config, server, tokenizer):
    report = await sample(config())
    assert (report.rows, report.sampled, report.completions, report.failed) == (12, 12, 36, 0)
    assert len(server.requests) == 12
    assert {(one["n"], one["temperature"], one["top_p"]) for one in server.requests} == {(3, 1.0, 1.0)}
    letters = {tokenizer(chr(97 + i))["input_ids"][0]: LOGP[i] for i in range(26)}
    with ScoreStore(config().out) as store:
        records = list(store.records(kinds=(ROLLOUT,)))
        assert len(records) == 12
        for record in records:
            assert len(record.rollouts()) == 3
            for rollout in record.rollouts():
                np.testing.assert_allclose(
                    rollout.logp, [letters[i] for i in rollout.completion_ids.tolist()], rtol=1e-6
                )
                ids = np.concatenate([rollout.prompt_ids, rollout.completion_ids])
                rows = store.get(CHATTY, ids, rollout.prompt_ids.size - 1, 5)
                np.testing.assert_allclose(rows.logp, np.tile(LOGP[:5], (rows.rows, 1)), rtol=1e-3)
                np.testing.assert_allclose(np.exp(rows.tail_logp), np.exp(LOGP[5:]).sum(), rtol=1e-4)
                assert np.array_equal(rows.actual_logp, rollout.logp)


async def test_what_was_drawn_is_never_drawn_again_and_another_seed_or_n_draws_anew(config, server):
    await sample(config(limit=5))
    first = len(server.requests)
    rest = await sample(config())
    assert (rest.cached, rest.sampled) == (5, 7)
    assert len(server.requests) == first + 7
    again = await sample(config())
    assert (again.cached, again.sampled, again.prompt_tokens) == (12, 0, 0)
    assert (await sample(config(seed=1))).sampled == 12
    assert (await sample(config(n=2))).sampled == 12
    assert (await sample(config(k=7))).sampled == 12


async def test_a_cache_that_takes_no_commit_ends_the_job(config, monkeypatch):
    """Else answers of hours would wait in memory for a crash."""

    def refused(_):
        raise CacheError("cannot write to the cache", got="No space left on device")

    async def never(*_):
        await asyncio.Event().wait()

    monkeypatch.setattr("topkd.compose.bulk.job._COMMIT_EVERY_S", 0.01)
    monkeypatch.setattr(ScoreStore, "commit", refused)
    monkeypatch.setattr(SampleJob, "ask", never)
    async with asyncio.timeout(240):
        with pytest.raises(CacheError, match="No space left"):
            await sample(config())


async def test_equal_prompts_in_one_file_are_asked_once(config, server, tmp_path):
    report = await sample(config(data=prompts(tmp_path / "twice.jsonl", ["a", "b", "a", "a"])))
    assert (report.sampled, report.cached, len(server.requests)) == (2, 2, 2)


async def test_the_cache_is_read_in_threads_and_never_on_the_event_loop(config, monkeypatch):
    reads, real = [], ScoreStore.get_rollouts

    def read(*arguments):
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            reads.append("thread")
        else:
            reads.append("event loop")
        return real(*arguments)

    monkeypatch.setattr(ScoreStore, "get_rollouts", read)
    assert (await sample(config())).sampled == 12
    assert (await sample(config())).cached == 12
    assert set(reads) == {"thread"}


async def test_an_ambiguous_completion_is_dropped_counted_and_not_paid_for_twice(config, server, tmp_path):
    texts = ["x", "y", f"{AMBIGUOUS} 1", f"{AMBIGUOUS} 2"]
    data = prompts(tmp_path / "odd.jsonl", texts)
    for n, kept, dropped in ((3, 10, 2), (1, 2, 2)):
        report = await sample(config(data=data, n=n, in_flight=1))
        assert (report.completions, report.ambiguous_completions) == (kept, dropped)
        asked = len(server.requests)
        assert (await sample(config(data=data, n=n))).cached == 4
        assert len(server.requests) == asked


async def test_while_no_answer_can_be_read_none_is_taken_for_bad_luck(config, server, tmp_path):
    data = prompts(tmp_path / "odd.jsonl", [f"{AMBIGUOUS} {i}" for i in range(3)])
    report = await sample(config(data=data, n=1))
    assert (report.sampled, report.failed, report.completions) == (0, 3, 0)
    assert not report.complete
    assert "--tokenizer" in report.refusals[0]["reason"]
    assert (await sample(config(data=data, n=1))).cached == 0
    many = prompts(tmp_path / "many.jsonl", [f"{AMBIGUOUS} {i}" for i in range(60)])
    with pytest.raises(ResponseError, match="in a row"):
        await sample(config(data=many, n=1))


async def test_a_prompt_that_the_server_renders_otherwise_is_an_error_not_a_sample(config, server):
    server.count_tokens = lambda messages: 3
    report = await sample(config())
    assert (report.failed, report.completions) == (12, 0)
    assert "another length" in report.refusals[0]["reason"]


@pytest.mark.parametrize("caps", [{"max_tokens": 150}, {"max_cost": 3e-4, "price_in": 1.0, "price_out": 4.0}])
async def test_a_cap_is_never_crossed_and_what_was_set_aside_comes_back(config, caps):
    report = await sample(config(**caps))
    assert report.stopped.startswith(next(iter(caps)))
    assert 0 < report.sampled < 12
    if "max_tokens" in caps:
        assert report.prompt_tokens + report.completion_tokens <= 150
        # At the most that a request can use, fewer would have fitted.
        assert report.sampled > 150 // (report.prompt_tokens // report.sampled + 3 * 6)
    else:
        assert report.cost <= 3e-4
    rest = await sample(config())
    assert (rest.cached, rest.sampled) == (report.sampled, 12 - report.sampled)


def test_a_spending_limit_gives_what_is_left_and_not_more(config):
    limit = SpendingLimit(config(max_tokens=100).caps())
    assert limit.take(40, 60)
    assert not limit.take(1, 0)
    limit.give_back(50)
    assert limit.take(10, 40)
    assert not limit.take(0, 1)
    assert limit.reached == "max_tokens = 100"


async def test_an_estimate_bounds_the_bill_and_asks_nothing(config, server, tmp_path):
    forecast = await sample(config(estimate=True, price_in=1.0, price_out=4.0))
    assert server.requests == []
    assert not (tmp_path / "cache").exists()
    report = await sample(config(price_in=1.0, price_out=4.0))
    assert forecast.prompt_tokens == report.prompt_tokens
    assert report.completion_tokens <= forecast.completion_tokens == 12 * 3 * 6
    assert report.cost <= forecast.cost
    again = await sample(config(estimate=True, price_in=1.0, price_out=4.0))
    assert (again.sampled, again.cached, again.cost) == (0, report.rows, 0.0), "what is in the cache is not paid again"
    more = await sample(config(estimate=True, n=2))
    assert more.sampled == forecast.sampled


async def test_rows_that_cannot_be_asked_are_named(config, tmp_path):
    data = tmp_path / "mixed.jsonl"
    rows = ['{"messages": [{"role": "user", "content": "a"}]}', '{"messages": [', '{"prompt": "b"}',
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}']  # fmt: skip
    data.write_text("\n".join(rows))
    report = await sample(config(data=data))
    assert (report.sampled, report.refused) == (1, 3)
    told = {one["row"]: one["reason"] for one in report.refusals}
    assert "column 15" in told[2]
    assert "the end of the line" in told[2]
    assert "chat completions need messages" in told[3]
    assert "end with a message that the teacher answers" in told[4]
    with pytest.raises(ConfigError, match="--tokenizer"):
        await sample(config(tokenizer=None))


def run_config(student, data, **changes):
    values = {
        "steps": 2,
        "k": 5,
        "student": {"model": str(student), "device": "cpu"},
        "teacher": {"url": "http://127.0.0.1:1"},
        "data": {"path": str(data)},
        "rollout": {"prompts_per_step": 6, "samples_per_prompt": 3, "max_completion_tokens": 6},
        "learner": {"lr": 1e-3},
        "replay": {"order": "shuffled"},
    }
    return RunConfig.model_validate(values | changes)


@pytest.mark.parametrize("kind", ["gjs", "scalar_kl", "topk_pg", "gjs_direct", "fkl"])
async def test_a_student_trains_on_what_the_teacher_wrote(config, student, tmp_path, kind):
    await sample(config())
    chosen = run_config(student, config().data, objective={"kind": kind})
    result = await replay(chosen, tmp_path / "run", cache=config().out)
    assert [record["divergence_mode"] for record in result.steps] == [kind] * 2
    assert sum(record["samples"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl", "step")) == 36
    assert result.steps[0]["behavior_kl_k3"] > 0.1, "the sampler was not the student"
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"kind": "gjs"}, "learner": {"importance": {"kind": "ppo"}}}, "gjs with ppo"),
        ({"learner": {"importance": {"kind": "none"}}}, "topk_pg without importance weights"),
        ({"objective": {"kind": "topk_pg", "gamma": 0.5}}, "gamma above 0"),
        ({"replay": {"order": "recorded"}}, "no recorded order"),
    ],
)
async def test_an_objective_that_cannot_learn_off_policy_is_refused_with_the_reason(
    config, student, tmp_path, changes, words
):
    await sample(config())
    with pytest.raises(ConfigError, match=words):
        await replay(run_config(student, config().data, **changes), tmp_path / "run", cache=config().out)


def test_a_recorded_run_is_no_off_policy_data(student, tmp_path):
    assert is_off_policy(build_sampled_policy(TeacherIdentity("t", revision="v2")))
    assert is_off_policy(TeacherIdentity("data", revision="run-notes"))
    assert not is_off_policy(TeacherIdentity("student", revision="run-12ab"))
    direct = run_config(student, "d", objective={"kind": "fkl"}, learner={"importance": {"kind": "none"}})
    check_off_policy(direct, build_sampled_policy(CHATTY))  # no sampled token, no weight


async def test_a_server_that_continues_ids_samples_for_prompts_of_any_form_with_hints(student, tokenizer, tmp_path):
    data = tmp_path / "any.jsonl"
    rows = [{"prompt_ids": [5, 9]}, {"prompt": "import"}, {"prompt": "import", "hint": "os"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    served = ServeConfig(model=str(student), served_model_name="teacher", port=0, max_logprobs=20, device="cpu")
    with ServerProcess(served) as running:
        config = SampleConfig(data=data, out=tmp_path / "c", teacher=running.url, tokenizer=str(student), k=4, n=2,
                              max_new_tokens=5)  # fmt: skip
        report = await sample(config)
        assert (report.sampled, report.completions) == (3, 6)
        assert (await sample(config)).cached == 3
    plain, hinted = tokenizer("import")["input_ids"], tokenizer("os\nimport")["input_ids"]
    with ScoreStore(tmp_path / "c") as store:
        found = [rollout for record in store.records(kinds=(ROLLOUT,)) for rollout in record.rollouts()]
        assert {tuple(rollout.prompt_ids.tolist()) for rollout in found} == {(5, 9), tuple(plain)}
        seen = {tuple(record.score()[0][: record.header.start + 1].tolist()) for record in store.records()}
    assert seen == {(5, 9), tuple(plain), tuple(hinted)}
