"""vLLM in this process: ``LLM.generate`` behind the same protocols as a server, its flat logprobs read as arrays.

Needs ``pip install 'topkd[vllm]'``. Requests that wait are given to the engine together; it batches them itself.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    build_vllm_sampling,
    check_finish_reason,
    prepare_sample_request,
)
from topkd.topk.errors import (
    AlignmentError,
    ConfigError,
    ContextLimitError,
    FinalServerError,
    KLimitError,
    RequestRefusedError,
    ResponseError,
    SyncError,
    TopkdError,
    UnsupportedError,
)
from topkd.topk.protocols import Ids, Version, WeightUpdate
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Float32, Int32, TopK

_LIMIT = re.compile(r"greater than max allowed: (\d+)")


@dataclass(slots=True)
class _Job:
    prompt: list[int]
    sampling: Any
    done: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    adapter: Any = None


class VllmInProcess:
    """Teacher, candidate scorer, sampler and weight sink on one ``vllm.LLM``.

    >>> async with VllmInProcess("models/teacher", dtype="bfloat16", max_logprobs=64) as teacher:  # doctest: +SKIP
    ...     rows = await teacher.score(ids, start=prompt_len - 1, k=20)

    Args:
        model: A folder or id for ``vllm.LLM``, or an ``LLM`` that is already there (with ``max_logprobs`` >= K).
        vocab_size: Ids outside it are refused.
        version: Name of the weights that are loaded.
        engine: Further arguments of ``vllm.LLM``.
    """

    def __init__(
        self, model: str | Any, *, vocab_size: int | None = None, version: Version = "", **engine: Any
    ) -> None:
        self.vocab_size, self.version = vocab_size, version
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="topkd-vllm")
        self._waiting: list[_Job] = []
        self._lock = threading.Lock()
        self._adapter: Any = None  # vLLM's own request for it; 0 is no adapter's number
        self._adapters = 0
        if isinstance(model, str):
            try:
                from vllm import LLM
            except ImportError as error:
                raise ConfigError("in-process vLLM is not installed", hint="pip install 'topkd[vllm]'") from error
            self._llm: Any = LLM(model, **engine)
        else:
            self._llm = model

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the engine's thread, after what is running."""
        await asyncio.to_thread(self._thread.shutdown)

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Score, as ``TeacherScorer``."""
        array = check_request_ids(ids, start, k, self.vocab_size)
        fields = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k, "flat_logprobs": True, "detokenize": False}
        reply = await self._generate(array.tolist(), fields)
        return read_flat_scores(reply.prompt_logprobs, array, start, k, self.vocab_size)

    async def score_candidates(self, ids: Ids, start: int, candidates: Int32) -> Float32:
        """Score candidates, as ``CandidateScorer``; needs vLLM 0.32 and its model runner V2."""
        array = check_request_ids(ids, start, 0, self.vocab_size)
        wanted = prepare_candidates(candidates, int(array.size) - 1 - start, self.vocab_size)
        fields = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprob_token_ids": wanted.tolist(),
            "prompt_logprob_start": start,
            "detokenize": False,
        }
        matrix = getattr(await self._generate(array.tolist(), fields), "prompt_token_id_logprobs", None)
        if matrix is None:
            raise ResponseError("the engine gives no candidate logprobs", hint="prefill began behind the start")
        values = np.asarray(matrix, dtype=np.float32)
        if values.shape != wanted.shape:
            raise AlignmentError("candidate logprobs of another shape", got=values.shape, expected=wanted.shape)
        return check_candidates(values, wanted, start)

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Draw, as ``Sampler``; NaN logprobs under inexact parameters, as the engine's are of the untempered model."""
        asked = prepare_sample_request(prompt_ids, n, params, k, self.vocab_size)
        version = self.version
        fields = build_vllm_sampling(n, asked.params, k) | {"flat_logprobs": True, "detokenize": False}
        reply = await self._generate(asked.prompt.tolist(), fields)
        outputs = sorted(reply.outputs, key=lambda output: output.index)
        if len(outputs) != n:
            raise ResponseError("wrong number of completions", got=len(outputs), expected=n)
        return [_read_rollout(output, asked, version) for output in outputs]

    async def push(self, update: WeightUpdate) -> Version:
        """Load a checkpoint folder in place and forget cached prefixes, or take an adapter; see ``WeightSink``.

        An adapter (needs ``enable_lora=True``) is what everything runs with from then on; the engine proves it with one
        token, and its prefixes are cached under it alone.

        Raises:
            SyncError: the weights could not be loaded; after full ones the engine must then not be used on.
        """

        def load() -> None:
            if update.kind == "lora":
                self._adopt(update)
                return
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": update.path})
            if self._llm.reset_prefix_cache() is False:
                raise SyncError("the prefix cache could not be reset: old states would be reused")

        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, load)
        except SyncError:
            raise
        except Exception as error:
            raise SyncError(
                "the engine could not load the weights", where=update.path, got=f"{type(error).__name__}: {error}"
            ) from error
        self.version = update.version
        return self.version

    async def sleep(self) -> None:
        """Give the device's memory back: weights move to the host, cached states are dropped. CUDA only."""
        await self._do(lambda: self._llm.sleep(level=1))

    async def wake(self) -> None:
        """Undo ``sleep``."""
        await self._do(self._llm.wake_up)

    async def _do(self, call: Callable[[], object]) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except Exception as error:
            raise convert_engine_error(error) from error

    def _adopt(self, update: WeightUpdate) -> None:
        from vllm import SamplingParams as EngineParams
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        adapter = LoRARequest(update.version, self._adapters, update.path)
        engine_params = EngineParams(max_tokens=1, temperature=0.0, detokenize=False)
        self._llm.generate([{"prompt_token_ids": [1]}], [engine_params], use_tqdm=False, lora_request=adapter)
        self._adapter = adapter

    async def _generate(self, prompt: list[int], fields: dict[str, Any]) -> Any:
        try:
            from vllm import SamplingParams as EngineParams

            sampling = EngineParams(**fields)
        except Exception as error:  # vLLM's own validation errors are no ValueError
            raise convert_engine_error(error) from error
        loop = asyncio.get_running_loop()
        job = _Job(prompt, sampling, loop.create_future(), loop, self._adapter)
        with self._lock:
            self._waiting.append(job)
        loop.run_in_executor(self._thread, self._run)
        return await job.done

    def _run(self) -> None:
        """Run whatever waits. A request that the engine refuses must not take the others with it."""
        with self._lock:
            jobs, self._waiting = self._waiting, []
        jobs = [job for job in jobs if not job.done.cancelled()]
        if not jobs:
            return
        try:
            self._answer(jobs)
        except Exception as error:  # noqa: BLE001 - every kind reaches the caller, as one of ours
            if len(jobs) == 1 or not isinstance(convert_engine_error(error), RequestRefusedError | UnsupportedError):
                for job in jobs:
                    _settle(job, convert_engine_error(error))
                return
            for job in jobs:
                try:
                    self._answer([job])
                except Exception as own:  # noqa: BLE001
                    _settle(job, convert_engine_error(own))

    def _answer(self, jobs: list[_Job]) -> None:
        inputs = [{"prompt_token_ids": job.prompt} for job in jobs]
        replies = self._llm.generate(inputs, [job.sampling for job in jobs], use_tqdm=False, **_adapter_option(jobs))
        for job, reply in zip(jobs, replies, strict=True):
            _settle(job, reply)


def _adapter_option(jobs: list[_Job]) -> dict[str, Any]:
    """Run each job with the adapter of the time when it was asked, whatever has been pushed since."""
    adapters = [job.adapter for job in jobs]
    return {"lora_request": adapters} if any(adapters) else {}


def _settle(job: _Job, value: Any) -> None:
    def settle() -> None:
        if job.done.done():
            return
        if isinstance(value, Exception):
            job.done.set_exception(value)
        else:
            job.done.set_result(value)

    job.loop.call_soon_threadsafe(settle)


def read_flat_scores(table: Any, ids: Int32, start: int, k: int, vocab_size: int | None = None) -> TopK:
    """Read rows ``start ..`` of flat prompt logprobs: one empty row, then the realised token and K more a row."""
    if table is None:
        raise ResponseError("the engine gives no prompt logprobs")
    check_reply_rows(len(table.start_indices), int(ids.size))
    return _rows(table, start + 1, ids[start + 1 :], start=start, k=k, vocab_size=vocab_size)


def _read_rollout(output: Any, asked: SampleRequest, version: str) -> Rollout:
    """Read one completion of the engine's, checked."""
    finish_reason = check_finish_reason(output.finish_reason)
    ids = np.array(list(output.token_ids), dtype=np.int32)
    check_reply_rows(len(output.logprobs.start_indices), int(ids.size))
    start = int(asked.prompt.size) - 1
    topk = _rows(output.logprobs, 0, ids, start=start, k=asked.k, vocab_size=asked.vocab_size)
    return build_rollout(asked, ids, topk.actual_logp, finish_reason, topk=topk, version=version)


def _rows(table: Any, first: int, actual: Int32, *, start: int, k: int, vocab_size: int | None) -> TopK:
    """Read rows ``first ..`` of a flat table. The realised token comes first in each, again where the K hold it."""
    want = k if vocab_size is None else min(k, vocab_size)
    begins, ends = (np.asarray(part[first:], dtype=np.int64) for part in (table.start_indices, table.end_indices))
    widths = ends - begins
    if (widths != want + 1).any():
        row = int(np.argmax(widths != want + 1))
        raise ResponseError("wrong number of entries", where=f"row {row}", got=int(widths[row]), expected=want + 1)
    at = begins[:, None] + np.arange(want + 1)
    ids = np.asarray(table.token_ids, dtype=np.int64)[at]
    logp = np.asarray(table.logprobs, dtype=np.float64)[at]
    if (ids[:, 0] != actual).any():
        row = int(np.argmax(ids[:, 0] != actual))
        raise AlignmentError(
            "the row scores another token", where=f"row {row}", got=int(ids[row, 0]), expected=int(actual[row])
        )
    if np.isnan(logp).any() or (logp > 1e-3).any():
        raise ResponseError("a logprob is NaN or above 0", hint="is logprobs_mode one of the logits modes?")
    if (ids < 0).any() or (vocab_size is not None and (ids >= vocab_size).any()):
        raise ResponseError("id outside the vocabulary", got=f"{ids.min()}..{ids.max()}")
    listed = ids[:, 1:].astype(np.int32)
    return topk_with_actual(listed, logp[:, 1:], start=start, k=want, actual_ids=actual, actual_logp=logp[:, 0])


def convert_engine_error(error: Exception) -> TopkdError:
    """Convert the engine's exception to one of ours."""
    text = str(error) or type(error).__name__
    limit_match = _LIMIT.search(text)
    if limit_match:
        limit = KLimitError(
            "K is above the engine's limit", got=text, expected=f"K <= {limit_match[1]}", hint="max_logprobs=..."
        )
        limit.limit = int(limit_match[1])
        return limit
    if "V2 model runner" in text or "unexpected keyword" in text.lower():
        return UnsupportedError(
            "the engine scores no candidates", got=text, hint="VLLM_USE_V2_MODEL_RUNNER=1, vLLM 0.32"
        )
    if "maximum model length" in text or "maximum context length" in text:
        return ContextLimitError(f"too long for the engine's context: {text}")
    if isinstance(error, (ValueError, TypeError)) or "ValidationError" in type(error).__name__:
        return RequestRefusedError(f"the engine refuses the request: {text}")
    return FinalServerError(f"the engine failed: {text}", got=type(error).__name__)
