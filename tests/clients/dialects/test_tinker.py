"""Tinker on a stand-in for its SDK, shaped like tinker 0.38's documented types; the service itself was never called."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.clients.toy import VOCAB, Toy
from topkd.clients.dialects.tinker import TinkerClient
from topkd.topk.errors import (
    AuthError,
    ConfigError,
    FinalServerError,
    RequestRefusedError,
    ResponseError,
    ServerBusyError,
    ServerFailedError,
    ServerTimeoutError,
    ServerUnreachableError,
)
from topkd.topk.samples import SamplingParams

TOY = Toy(seed=11)
IDS = np.random.default_rng(2).integers(0, VOCAB, 10)


@dataclass
class TensorData:
    data: list[float]
    dtype: str
    shape: list[int]

    def to_numpy(self) -> np.ndarray:
        return np.array(self.data).reshape(self.shape)


@dataclass
class TopkLogprobs:
    token_ids: np.ndarray
    logprobs: np.ndarray


class Sampling:
    """``SamplingClient.sample`` as documented: full prompt length, sentinels before the last n, 0.0 where -1."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.spoil: Any = lambda reply: None

    async def sample(
        self,
        prompt: list[int],
        num_samples: int,
        sampling_params: Any,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: Any = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> Any:
        self.calls.append(locals())
        if self.error:
            raise self.error
        rows, length = TOY.rows(prompt), len(prompt)
        reply = types.SimpleNamespace(
            prompt_logprobs_np=None, topk_prompt_logprobs_np=None, target_prompt_logprobs=None
        )
        if include_prompt_logprobs:
            assert prompt_logprobs_last_n is not None
            assert 1 <= prompt_logprobs_last_n <= length - 1
            first, k = length - prompt_logprobs_last_n, topk_prompt_logprobs
            logp = np.full(length, np.nan, np.float32)
            logp[first:] = rows[np.arange(first - 1, length - 1), prompt[first:]]
            reply.prompt_logprobs_np = logp
            if k:
                ids, values = np.zeros((length, k), np.int32), np.full((length, k), -99999.0, np.float32)
                for at in range(first, length):
                    ids[at], values[at] = zip(*TOY.top(rows[at - 1], k), strict=True)
                reply.topk_prompt_logprobs_np = TopkLogprobs(ids, values)
        if target_prompt_logprobs is not None:
            asked = target_prompt_logprobs.to_numpy()
            assert asked.shape[0] == length - 1
            values = np.take_along_axis(rows, np.maximum(asked, 0), axis=1)
            values = np.where(asked < 0, 0.0, values)
            reply.target_prompt_logprobs = TensorData(values.ravel().tolist(), "float32", list(asked.shape))
        reply.sequences = [
            self._sequence(prompt, sampling_params, topk_sample_logprobs, seed) for seed in range(num_samples)
        ]
        self.spoil(reply)
        return reply

    def _sequence(self, prompt: list[int], params: Any, k: int, seed: int) -> Any:
        drawn = TOY.draw(prompt, params.max_tokens, seed=seed)
        rows = TOY.rows([*prompt, *drawn])[len(prompt) - 1 :]
        lists = [TOY.top(row, k) for row in rows]
        top = (
            TopkLogprobs(np.array([[t for t, _ in r] for r in lists]), np.array([[v for _, v in r] for r in lists]))
            if k
            else None
        )
        return types.SimpleNamespace(
            stop_reason="length",
            sequence_id="s",
            tokens_np=np.array(drawn, np.int32),
            logprobs_np=rows[np.arange(len(drawn)), drawn].astype(np.float32),
            topk_logprobs_np=top,
        )


@pytest.fixture
def sdk(monkeypatch: pytest.MonkeyPatch) -> Sampling:
    fake = types.ModuleType("tinker")
    fake.types = types.SimpleNamespace(  # type: ignore[attr-defined]
        ModelInput=types.SimpleNamespace(from_ints=list), SamplingParams=types.SimpleNamespace, TensorData=TensorData
    )
    monkeypatch.setitem(sys.modules, "tinker", fake)
    return Sampling()


@pytest.mark.parametrize(("start", "k"), [(0, 5), (4, 1), (8, VOCAB), (3, 0)])
async def test_a_score_is_the_models_own_rows_and_only_they_are_computed(sdk: Sampling, start: int, k: int):
    scores = await TinkerClient(sdk, vocab_size=VOCAB).score(IDS, start, k)
    rows = TOY.rows(IDS)[start:]
    np.testing.assert_array_equal(scores.actual_ids, IDS[start + 1 :])
    np.testing.assert_allclose(scores.actual_logp, rows[np.arange(len(rows)), IDS[start + 1 :]], atol=1e-6)
    np.testing.assert_array_equal(scores.ids, np.argsort(-rows, axis=1)[:, :k])
    assert sdk.calls[0]["prompt_logprobs_last_n"] == len(IDS) - 1 - start


async def test_a_candidate_that_was_not_asked_for_is_impossible_not_certain(sdk: Sampling):
    asked = np.array([[1, -1], [2, 3], [-1, -1], [5, 6], [7, 7]])
    got = await TinkerClient(sdk, vocab_size=VOCAB).score_candidates(IDS, 4, asked)
    truth = np.take_along_axis(TOY.rows(IDS)[4:], np.maximum(asked, 0), axis=1)
    np.testing.assert_allclose(got, np.where(asked < 0, -np.inf, truth), atol=1e-6)
    sent = sdk.calls[0]["target_prompt_logprobs"].to_numpy()
    assert (sent[:4] == -1).all(), "rows before the start cost nothing"


async def test_draws_are_exact_listed_and_fully_specified(sdk: Sampling):
    drawn = await TinkerClient(sdk, vocab_size=VOCAB, version="w1").sample(
        IDS, 3, SamplingParams(6, stop_token_ids=(4,)), k=5
    )
    assert len(drawn) == 3
    for rollout in drawn:
        rows = TOY.rows([*IDS, *rollout.completion_ids])[len(IDS) - 1 :]
        np.testing.assert_allclose(rollout.logp, rows[np.arange(6), rollout.completion_ids], atol=1e-6)
        assert rollout.topk is not None
        np.testing.assert_array_equal(rollout.topk.ids, np.argsort(-rows, axis=1)[:, :5])
        assert rollout.version == "w1"
    params = sdk.calls[0]["sampling_params"]
    assert (params.temperature, params.top_k, params.top_p, params.stop) == (1.0, -1, 1.0, [4])
    [hot] = await TinkerClient(sdk).sample(IDS, 1, SamplingParams(6, temperature=0.3))
    assert np.isnan(hot.logp).all()
    with pytest.raises(ConfigError, match="temperature, top_k and top_p only"):
        await TinkerClient(sdk).sample(IDS, 1, SamplingParams(6, min_p=0.1))


def _entry(reply: Any, row: int, column: int, token: int, logp: float) -> None:
    reply.topk_prompt_logprobs_np.token_ids[row, column] = token
    reply.topk_prompt_logprobs_np.logprobs[row, column] = logp


def _shift(reply: Any) -> None:
    lists = reply.topk_prompt_logprobs_np
    lists.token_ids, lists.logprobs = np.roll(lists.token_ids, 1, axis=0), np.roll(lists.logprobs, 1, axis=0)


def _widen(reply: Any, more: int) -> None:
    lists = reply.topk_prompt_logprobs_np
    lists.token_ids = lists.token_ids.astype(np.int64) + more


def _set(name: str, value: Any) -> Any:
    return lambda reply: setattr(reply, name, value)


@pytest.mark.parametrize(
    "spoil",
    [
        _set("prompt_logprobs_np", None),
        _set("topk_prompt_logprobs_np", None),
        lambda reply: reply.prompt_logprobs_np.__setitem__(5, np.nan),
        lambda reply: reply.topk_prompt_logprobs_np.logprobs.__setitem__((5, 2), np.nan),
        lambda reply: _entry(reply, 5, 4, 0, -99999.0),
        lambda reply: setattr(reply, "prompt_logprobs_np", reply.prompt_logprobs_np[1:]),
        _shift,
        lambda reply: reply.topk_prompt_logprobs_np.token_ids.__setitem__((6, 1), VOCAB),
        lambda reply: _widen(reply, 2**32),  # would wrap to the right ids
    ],
)
async def test_a_reply_that_cannot_be_right_is_refused(sdk: Sampling, spoil: Any):
    sdk.spoil = spoil
    with pytest.raises(ResponseError):
        await TinkerClient(sdk, vocab_size=VOCAB).score(IDS, 2, 5)


class APIConnectionError(Exception):
    pass


class APITimeoutError(APIConnectionError):
    pass


def _status(code: int) -> Exception:
    error = Exception("said the service")
    error.status_code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (_status(401), AuthError),
        (_status(429), ServerBusyError),
        (_status(400), RequestRefusedError),
        (_status(503), ServerFailedError),
        (APIConnectionError("no route"), ServerUnreachableError),
        (APITimeoutError("slow"), ServerTimeoutError),
        (ValueError("bad rows"), RequestRefusedError),
        (RuntimeError("?"), FinalServerError),
        (TypeError("unexpected keyword argument 'prompt_logprobs_last_n'"), ConfigError),
    ],
)
async def test_every_exception_of_the_sdk_leaves_as_one_of_ours(
    sdk: Sampling, raised: Exception, expected: type[Exception]
):
    sdk.error = raised
    with pytest.raises(expected):
        await TinkerClient(sdk).score(IDS, 0, 2)


def test_without_the_sdk_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(ConfigError, match=r"topkd\[tinker\]"):
        TinkerClient.connect(base_model="x")
