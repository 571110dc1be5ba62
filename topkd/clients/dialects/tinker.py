"""Tinker through its own SDK: scores, scores candidates, samples. Needs ``pip install 'topkd[tinker]'``.

Written from tinker 0.38's types and documents; no reply of the service was recorded. The SDK owns connection, key and
retries, and arrays come without a wire format of ours: empty list places are ``(0, -99999)``, an unknown logprob is
NaN, and a candidate that was not asked for comes back as 0.0, which would be probability one.
"""

from __future__ import annotations

import asyncio
from typing import Any, Self

import numpy as np

from topkd.clients.decoding.checks import (
    check_candidates,
    check_reply_rows,
    check_request_ids,
    prepare_candidates,
    topk_with_actual,
)
from topkd.clients.decoding.sampled import (
    SampleRequest,
    build_rollout,
    check_completion_ids,
    check_finish_reason,
    prepare_sample_request,
)
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
    TopkdError,
)
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import PAD_ID, Float32, Float64, Int32, TopK

_EMPTY = -9e4  # the SDK's sentinel is -99999


class TinkerClient:
    """Teacher, candidate scorer and sampler on one ``tinker.SamplingClient``.

    >>> teacher = TinkerClient.connect(base_model="Qwen/Qwen3-8B")          # doctest: +SKIP

    Args:
        client: A ``tinker.SamplingClient``.
        vocab_size: Ids outside it are refused.
        version: Name of the weights behind the client.
        timeout_s: One call, the SDK's own retries included.
    """

    def __init__(
        self, client: Any, *, vocab_size: int | None = None, version: str = "", timeout_s: float = 900.0
    ) -> None:
        self._client, self.vocab_size, self.version, self._timeout_s = client, vocab_size, version, timeout_s
        self._types = _sdk().types

    @classmethod
    def connect(
        cls, *, base_model: str | None = None, model_path: str | None = None, vocab_size: int | None = None
    ) -> TinkerClient:
        """Open a client of the service for a base model or for saved weights (``tinker://...``); the SDK finds the key.

        Raises:
            ConfigError: not exactly one of the two is given, or the SDK is not installed.
            ServerError: the service does not answer as asked.
        """
        if (base_model is None) == (model_path is None):
            raise ConfigError("Tinker needs either base_model or model_path")
        sdk = _sdk()
        try:
            service = sdk.ServiceClient()
            client = service.create_sampling_client(base_model=base_model, model_path=model_path)
        except Exception as error:  # the SDK's tree, and what lies below it
            raise _convert_error(error) from error
        return cls(client, vocab_size=vocab_size, version=model_path or "")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Do nothing: the SDK closes its session with the process."""

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Score, as ``TeacherScorer``; only the rows asked for are computed."""
        array = check_request_ids(ids, start, k, self.vocab_size)
        actual = array[start + 1 :]
        reply = await self._sample(
            array,
            1,
            SamplingParams(1),
            include_prompt_logprobs=True,
            topk_prompt_logprobs=k,
            prompt_logprobs_last_n=int(actual.size),
        )
        if reply.prompt_logprobs_np is None:
            raise ResponseError("the reply has no prompt logprobs", hint="this model or SDK gives none")
        logp = np.asarray(reply.prompt_logprobs_np, dtype=np.float64)
        check_reply_rows(int(logp.size), int(array.size))
        return _rows(
            reply.topk_prompt_logprobs_np,
            logp[start + 1 :],
            first=start + 1,
            length=int(array.size),
            actual=actual,
            start=start,
            k=k,
            vocab_size=self.vocab_size,
        )

    async def score_candidates(self, ids: Ids, start: int, candidates: Int32) -> Float32:
        """Score candidates, as ``CandidateScorer``: own ids at each row; rows before ``start`` are not computed."""
        array = check_request_ids(ids, start, 0, self.vocab_size)
        wanted = prepare_candidates(candidates, int(array.size) - 1 - start, self.vocab_size)
        if not (wanted >= 0).any():
            return np.full(wanted.shape, -np.inf, dtype=np.float32)
        asked = np.full((array.size - 1, wanted.shape[1]), PAD_ID, dtype=np.int64)
        asked[start:] = wanted
        tensor = self._types.TensorData(data=asked.ravel().tolist(), dtype="int64", shape=list(asked.shape))
        reply = await self._sample(array, 1, SamplingParams(1), target_prompt_logprobs=tensor)
        if reply.target_prompt_logprobs is None:
            raise ResponseError("the reply has no target_prompt_logprobs", hint="the SDK is too old")
        values = np.asarray(reply.target_prompt_logprobs.to_numpy(), dtype=np.float32)
        check_reply_rows(values.size, asked.size)
        kept = values.reshape(asked.shape)[start:]
        if not np.isfinite(kept[wanted >= 0]).all() or (kept[wanted >= 0] > 1e-3).any():
            raise ResponseError("the logprob of a candidate is invalid", expected="a finite number <= 0")
        return check_candidates(np.where(wanted >= 0, kept, -np.inf).astype(np.float32), wanted, start)

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Draw, as ``Sampler``; NaN logprobs unless the draw is the policy's own."""
        asked = prepare_sample_request(prompt_ids, n, params, k, self.vocab_size)
        if params.min_p or params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            raise ConfigError("Tinker samples with temperature, top_k and top_p only")
        reply = await self._sample(asked.prompt, n, asked.params, topk_sample_logprobs=k)
        if len(reply.sequences) != n:
            raise ResponseError("wrong number of completions", got=len(reply.sequences), expected=n)
        return [self._rollout(sequence, asked) for sequence in reply.sequences]

    def _rollout(self, sequence: Any, asked: SampleRequest) -> Rollout:
        finish_reason = check_finish_reason(sequence.stop_reason)
        if sequence.tokens_np is None or sequence.logprobs_np is None:
            raise ResponseError("a sequence comes without tokens or logprobs")
        ids = check_completion_ids(np.asarray(sequence.tokens_np, dtype=np.int32), asked)
        logp = np.asarray(sequence.logprobs_np, dtype=np.float64)
        check_reply_rows(int(logp.size), int(ids.size))
        topk = _rows(
            sequence.topk_logprobs_np,
            logp,
            first=0,
            length=int(ids.size),
            actual=ids,
            start=int(asked.prompt.size) - 1,
            k=asked.k,
            vocab_size=self.vocab_size,
        )
        return build_rollout(asked, ids, topk.actual_logp, finish_reason, topk=topk, version=self.version)

    async def _sample(self, ids: Int32, n: int, params: SamplingParams, **options: Any) -> Any:
        sampling = self._types.SamplingParams(
            max_tokens=params.max_tokens,
            seed=params.seed,
            stop=list(params.stop_token_ids) or None,
            temperature=params.temperature,
            top_k=params.top_k or -1,
            top_p=params.top_p,
        )
        prompt = self._types.ModelInput.from_ints(ids.tolist())
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._client.sample(prompt=prompt, num_samples=n, sampling_params=sampling, **options)
        except TimeoutError as error:
            raise ServerTimeoutError(
                "no reply in time", where="Tinker", expected=f"within {self._timeout_s:g} s"
            ) from error
        except TypeError as error:
            raise ConfigError(
                "the installed tinker SDK is too old", got=str(error), hint="pip install -U tinker"
            ) from error
        except Exception as error:  # the SDK's tree, and what lies below it
            raise _convert_error(error) from error


def _rows(
    lists: Any,
    logp: Float64,
    *,
    first: int,
    length: int,
    actual: Int32,
    start: int,
    k: int,
    vocab_size: int | None,
) -> TopK:
    if np.isnan(logp).any() or (logp > 1e-3).any() or (logp <= _EMPTY).any():
        bad = int(np.argmax(np.isnan(logp) | (logp > 1e-3) | (logp <= _EMPTY)))
        raise ResponseError(
            "the logprob of a realised token is invalid", where=f"row {bad}", got=float(logp[bad]), expected="<= 0"
        )
    want = k if vocab_size is None else min(k, vocab_size)
    if want == 0:
        none = np.empty((actual.size, 0))
        return topk_with_actual(none.astype(np.int32), none, start=start, k=0, actual_ids=actual, actual_logp=logp)
    if lists is None:
        raise ResponseError("the reply has no top-k logprobs")
    ids, values = np.asarray(lists.token_ids), np.asarray(lists.logprobs, dtype=np.float64)
    check_reply_rows(int(ids.shape[0]), length)
    ids, values = ids[first:, :want], values[first:, :want]
    if ids.shape != (actual.size, want) or values.shape != ids.shape:
        raise ResponseError("wrong number of entries", got=ids.shape, expected=(actual.size, want))
    empty = (values <= _EMPTY) & (ids == 0)
    if empty.any():
        row = int(np.argmax(empty.any(axis=1)))
        raise ResponseError("wrong number of entries", where=f"row {row}", got=int((~empty[row]).sum()), expected=want)
    if np.isnan(values).any() or (values > 1e-3).any():
        raise ResponseError("a logprob is NaN or above 0")
    if (ids < 0).any() or (ids >= (2**31 if vocab_size is None else vocab_size)).any():
        raise ResponseError("id outside the vocabulary", got=f"{ids.min()}..{ids.max()}")
    return topk_with_actual(ids.astype(np.int32), values, start=start, k=want, actual_ids=actual, actual_logp=logp)


_STATUS: dict[int, tuple[type[TopkdError], str]] = {
    401: (AuthError, "refuses the key (TINKER_API_KEY)"),
    403: (AuthError, "refuses the key (TINKER_API_KEY)"),
    429: (ServerBusyError, "is busy"),
}


def _sdk() -> Any:
    try:
        import tinker
    except ImportError as error:
        raise ConfigError("the tinker SDK is not installed", hint="pip install 'topkd[tinker]'") from error
    return tinker


def _convert_error(error: Exception) -> TopkdError:
    """Convert the SDK's exception to one of ours; its message, never its request (which holds the key)."""
    if isinstance(error, TopkdError):
        return error
    text, names = f"{type(error).__name__}: {error}", {base.__name__ for base in type(error).__mro__}
    status = getattr(error, "status_code", None)
    kind: type[TopkdError]
    if isinstance(status, int) and status >= 400:
        kind, what = _STATUS.get(status, (ServerFailedError if status >= 500 else RequestRefusedError, "refuses this"))
    elif "APITimeoutError" in names:
        kind, what = ServerTimeoutError, "did not answer in time"
    elif "APIConnectionError" in names or isinstance(error, OSError):
        kind, what = ServerUnreachableError, "cannot be reached"
    elif isinstance(error, ValueError):
        kind, what = RequestRefusedError, "refuses the request"
    else:
        kind, what = FinalServerError, "failed"
    return kind(f"Tinker {what}: {text}")
