"""The in-process sampler: exact logprobs, honest ends, nothing leaking in."""

import asyncio
import inspect
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.engine.pieces import VOCAB, model_folder
from topkd.engine.models.local_teacher import LocalTeacher
from topkd.engine.models.sampler import InProcessSampler
from topkd.engine.models.student import Student
from topkd.topk import SamplingParams
from topkd.topk.errors import ConfigError

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return Student.load(str(model_folder(tmp_path_factory.mktemp("model"))), "cpu")


def float64_logp(student, ids):
    with torch.inference_mode():
        logits = student.model(input_ids=torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


async def test_logprobs_equal_the_models_own_log_softmax_for_ragged_batches(student):
    drawn = await InProcessSampler(student).sample_batch(PROMPTS, 2, SamplingParams(max_tokens=12, seed=3), k=7)
    for prompt, rollouts in zip(PROMPTS, drawn, strict=True):
        assert len(rollouts) == 2
        for rollout in rollouts:
            assert rollout.prompt_ids.tolist() == prompt
            reference = float64_logp(student, [*prompt, *rollout.completion_ids.tolist()])
            rows = reference[len(prompt) - 1 : -1]
            realised = rows[np.arange(len(rows)), rollout.completion_ids]
            np.testing.assert_allclose(rollout.logp, realised, atol=2e-5)
            order = np.sort(rows, axis=1)[:, ::-1][:, :7]
            np.testing.assert_allclose(rollout.topk.logp, order, atol=2e-5)
            np.testing.assert_allclose(np.exp(rollout.topk.tail_logp), 1 - np.exp(order).sum(axis=1), atol=2e-5)
            assert rollout.topk.start == len(prompt) - 1


async def test_the_same_seed_gives_the_same_rollouts_and_another_seed_does_not(student):
    sampler = InProcessSampler(student)
    draws = [
        [rollout.completion_ids.tolist() for (rollout,) in await sampler.sample_batch(PROMPTS, 1, params)]
        for params in (SamplingParams(max_tokens=10, seed=1),) * 2 + (SamplingParams(max_tokens=10, seed=2),)
    ]
    assert draws[0] == draws[1] != draws[2]


async def test_a_few_rollouts_carry_their_lists_unasked_and_nothing_else_changes(student):
    params = SamplingParams(max_tokens=6, seed=4)
    plain = await InProcessSampler(student, batch_size=5).sample_batch(PROMPTS, 4, params)
    shown = await InProcessSampler(student, batch_size=5, shown_k=9).sample_batch(PROMPTS, 4, params)
    asked = await InProcessSampler(student, batch_size=5, shown_k=9).sample_batch(PROMPTS, 4, params, k=3)
    flat = [[rollout for group in drawn for rollout in group] for drawn in (plain, shown, asked)]
    for place, (one, other, third) in enumerate(zip(*flat, strict=True)):
        assert one.completion_ids.tolist() == other.completion_ids.tolist() == third.completion_ids.tolist()
        assert one.topk is None
        assert third.topk.k == 3
        assert (other.topk is not None) == (place < InProcessSampler.SHOWN)
        if other.topk is not None:
            assert other.topk.k == 9
            np.testing.assert_array_equal(other.topk.logp[:, :3], third.topk.logp)
            np.testing.assert_array_equal(other.topk.actual_logp, other.logp)


async def test_a_stop_token_ends_the_completion_is_kept_and_is_scored(student):
    free = (await InProcessSampler(student).sample([5, 6], 1, SamplingParams(max_tokens=20, seed=0)))[0]
    stop = int(free.completion_ids[4])
    first = free.completion_ids.tolist().index(stop)
    (ended,) = await InProcessSampler(student, stop_ids=[stop]).sample([5, 6], 1, SamplingParams(max_tokens=20, seed=0))
    assert ended.completion_ids.tolist() == free.completion_ids[: first + 1].tolist()
    assert ended.finish_reason == "stop"
    assert free.finish_reason == "length"
    np.testing.assert_allclose(ended.logp, free.logp[: first + 1], atol=1e-6)


async def test_a_hostile_generation_config_changes_nothing(student, tmp_path):
    plain = await InProcessSampler(student).sample_batch(PROMPTS, 1, SamplingParams(max_tokens=16, seed=5))
    student.model.save_pretrained(tmp_path)
    hostile = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.3}
    (tmp_path / "generation_config.json").write_text(json.dumps(hostile))
    other = Student.load(str(tmp_path), "cpu")
    again = await InProcessSampler(other).sample_batch(PROMPTS, 1, SamplingParams(max_tokens=16, seed=5))
    for (one,), (two,) in zip(plain, again, strict=True):
        assert one.completion_ids.tolist() == two.completion_ids.tolist()


async def test_sampling_follows_the_policys_distribution(student):
    expected = np.exp(float64_logp(student, [5, 6, 7]))[-1]
    drawn = await InProcessSampler(student, batch_size=2000).sample(
        [5, 6, 7], 2000, SamplingParams(max_tokens=1, seed=0)
    )
    counts = np.bincount([int(r.completion_ids[0]) for r in drawn], minlength=len(expected))
    top = np.argsort(expected)[-5:]
    spread = np.sqrt(expected[top] * (1 - expected[top]) / 2000)
    assert (np.abs(counts[top] / 2000 - expected[top]) < 5 * spread).all()


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.7), SamplingParams(top_p=0.9), SamplingParams(top_k=5)]
)
async def test_a_truncating_or_tempered_sampler_is_refused(student, params):
    with pytest.raises(ConfigError, match="needs temperature 1"):
        await InProcessSampler(student).sample([5], 1, params)


async def test_an_empty_prompt_is_refused(student):
    with pytest.raises(ConfigError, match="at least one token"):
        await InProcessSampler(student).sample([], 1, SamplingParams(max_tokens=2))


@pytest.mark.parametrize("ids", [[1.5, 2.0], [5, VOCAB], [5, -1], [2**40], ["1"]], ids=repr)
async def test_ids_that_the_model_does_not_have_are_refused_by_sampler_and_teacher(student, ids):
    with pytest.raises(ConfigError, match=r"token ids must be integers|lies outside.*another tokenizer's"):
        await InProcessSampler(student).sample(ids, 1, SamplingParams(max_tokens=2))
    teacher = LocalTeacher(student)
    for sequence in ([*ids, 5], [5, *ids]):  # the last one is only looked up
        with pytest.raises(ConfigError, match=r"token ids must be integers|lies outside.*another tokenizer's"):
            await teacher.score(sequence, 0, 3)
    with pytest.raises(ConfigError, match="a token id lies outside"):
        await teacher.score_candidates([5, 6], 0, np.array([[3, VOCAB]], np.int32))
    padded = await teacher.score_candidates([5, 6], 0, np.array([[3, -1]], np.int32))
    assert np.isneginf(padded[0]).tolist() == [False, True]


@pytest.mark.parametrize(("n", "k"), [(0, 0), (1, -1)])
async def test_counts_that_ask_for_nothing_are_refused(student, n, k):
    with pytest.raises(ConfigError, match="at least"):
        await InProcessSampler(student).sample([5], n, SamplingParams(max_tokens=2), k=k)
    with pytest.raises(ConfigError, match="at least 0"):
        await LocalTeacher(student).score([5, 6], 0, -1)


async def test_a_batch_that_is_given_up_stops_at_its_next_token(student):
    sampler = InProcessSampler(student)
    drawn, given_up = [], threading.Event()
    real = sampler._drawn

    def held(*args):
        drawn.append(1)
        assert len(drawn) < 3 or given_up.wait(240)
        return real(*args)

    sampler._drawn = held
    task = asyncio.create_task(sampler.sample(np.array([3, 4]), 2, SamplingParams(max_tokens=4000, seed=1)))
    while len(drawn) < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    given_up.set()
    with sampler.lock:  # free as soon as the thread has left
        assert len(drawn) == 3


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
async def test_the_cache_is_passed_by_the_name_that_the_model_gives_it(student, name, monkeypatch):
    """Releases of transformers differ in it; without its cache a model would see the newest token alone."""
    plain = await InProcessSampler(student).sample_batch(PROMPTS, 1, SamplingParams(max_tokens=8, seed=5))
    own = next(n for n in ("cache", "past_key_values") if n in inspect.signature(student.backbone.forward).parameters)
    forward = student.backbone.forward

    def renamed(input_ids, attention_mask, position_ids, use_cache, kept=None):
        output = forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
            **{own: kept},
        )  # fmt: skip
        return SimpleNamespace(last_hidden_state=output.last_hidden_state, **{name: getattr(output, own)})

    parameters = [
        parameter.replace(name=name) if parameter.name == "kept" else parameter
        for parameter in inspect.signature(renamed).parameters.values()
    ]

    def called(**given):
        return renamed(**{"kept" if key == name else key: value for key, value in given.items()})

    called.__signature__ = inspect.Signature(parameters)
    monkeypatch.setattr(student.backbone, "forward", called)
    again = await InProcessSampler(student).sample_batch(PROMPTS, 1, SamplingParams(max_tokens=8, seed=5))
    assert [r.completion_ids.tolist() for (r,) in again] == [r.completion_ids.tolist() for (r,) in plain]
