"""vLLM's ``/inference/v1/generate``: token ids in and out, cheaper scores, and the only route that scores candidates.

With ``detokenize: false`` the server neither decodes nor escapes a string for each entry: the same scores as
``/v1/completions`` in about a third of its time. Mounted by vLLM with ``--enable-scale-out``, and by ``topkd serve``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np

from topkd.clients.decoding.binary import read_npy_matrix
from topkd.clients.decoding.checks import check_candidates, check_request_ids, prepare_candidates
from topkd.clients.decoding.sampled import build_vllm_sampling, read_generate_rollouts
from topkd.clients.decoding.vllm import Ended, read_generate_scores, refuse_abort, typed
from topkd.clients.dialects.base import ServerFacts
from topkd.clients.dialects.vllm import VllmCompletions, build_salt
from topkd.clients.http.endpoint import RequestInfo
from topkd.clients.http.retry import Try
from topkd.topk.errors import KLimitError, RequestRefusedError, ResponseError, UnsupportedError
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Float32, Int32, TopK

ROUTE = "/inference/v1/generate"
Schema = Literal["rows", "shared"]
_COMPLETE = (0, 33)  # from here on generated lists are whole; before, the sampled token takes a place in them
_ROWS = (0, 32)
_MAX_WINDOWS = 16
_SHARED = 1024  # ids of a shared list on a server without a limit


class _Candidates(msgspec.Struct):
    prompt_token_id_logprobs: bytes | None = None  # msgspec decodes the base64
    choices: list[Ended] = []


_CANDIDATES = msgspec.json.Decoder(_Candidates)


def build_generate_score(model: str, ids: Int32, k: int) -> dict[str, Any]:
    """Build a request that scores every position of ``ids`` without a string in the reply."""
    sampling = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": k, "detokenize": False}
    return {"model": model, "token_ids": ids.tolist(), "sampling_params": sampling, "return_token_ids": True}


def build_generate_sample(model: str, prompt: Int32, n: int, params: SamplingParams, k: int) -> dict[str, Any]:
    """Build a sampling request with every parameter stated."""
    sampling = build_vllm_sampling(n, params, k) | {"detokenize": False}
    return {"model": model, "token_ids": prompt.tolist(), "sampling_params": sampling}


def build_generate_candidates(model: str, ids: Int32, start: int, candidates: list[Any]) -> dict[str, Any]:
    """Build a request that scores ``candidates`` (one list per row, or one for all rows), from row ``start`` on."""
    sampling = {
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprob_token_ids": candidates,
        "prompt_logprob_start": start,
        "detokenize": False,
    }
    return {"model": model, "token_ids": ids.tolist(), "sampling_params": sampling}


def read_generate_candidates(body: bytes, *, rows: int, columns: int) -> Float32:
    """Read float32 [rows, columns], in the order asked; a 200 without the field is an error.

    Raises:
        ResponseError: the field is null, or values that are no logprobs.
        AlignmentError: another shape: the server read the request in another schema.
    """
    reply = typed(body, _CANDIDATES)
    raw = reply.prompt_token_id_logprobs
    for choice in reply.choices:
        refuse_abort(choice.finish_reason)
    if raw is None:
        raise ResponseError(
            "the reply has no prompt_token_id_logprobs",
            got="null",
            expected=f"a matrix of {rows} x {columns}",
            hint="the server ignored the field, or began behind its start because of a cached prefix",
        )
    return read_npy_matrix(raw, rows=rows, k=columns, what="prompt_token_id_logprobs")


class VllmGenerate(VllmCompletions):
    """Teacher, candidate scorer and sampler over ``/inference/v1/generate``; arguments as ``VllmCompletions``."""

    dialect = "vllm_generate"
    route: ClassVar[str] = ROUTE
    _build_score = staticmethod(build_generate_score)
    _read_scores = staticmethod(read_generate_scores)
    _build_sample = staticmethod(build_generate_sample)
    _read_rollouts = staticmethod(read_generate_rollouts)
    _version: tuple[int, ...] | None = None
    _schema: Schema | None = None
    _limit: int | None = None

    @classmethod
    async def matches(cls, server: ServerFacts) -> bool:
        """Recognise a vLLM with ``/inference/v1/generate``, where scores are cheaper."""
        return bool(await server.version()) and await server.wire.mounted(ROUTE)

    async def version(self) -> tuple[int, ...]:
        """Ask for major and minor number of the server; () when it states none."""
        if self._version is None:
            version_match = re.match(r"v?(\d+)\.(\d+)", await self.server_version())
            self._version = (int(version_match[1]), int(version_match[2])) if version_match else ()
        return self._version

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Score, as ``TeacherScorer``: rows ``start .. len(ids) - 2``."""
        with _explain_refusal():
            return await super().score(ids, start, k)

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Draw as ``VllmCompletions``. Before vLLM 0.33 a list of K costs K + 1, which the server's limit caps."""
        with _explain_refusal():
            return await super().sample(prompt_ids, n, params, k=k)

    async def _list_width(self, k: int) -> int:
        return k if k == 0 or await self.version() >= _COMPLETE else k + 1

    async def score_candidates(self, ids: Ids, start: int, candidates: Int32) -> Float32:
        """Score ``candidates`` [R, K] at rows ``start ..``: float32 [R, K] logprobs; -1 pads give -inf.

        The schema is chosen by the server's version, changed when the server refuses it, and the reply's shape proves
        it. vLLM 0.31 takes one list for all rows: the rows are then cut into windows whose union it serves.

        Raises:
            UnsupportedError: the server scores no candidates, or the rows share too few of them for its schema.
        """
        array = check_request_ids(ids, start, 0, self.vocab_size)
        wanted = prepare_candidates(candidates, int(array.size) - 1 - start, self.vocab_size)
        if self._schema is None:
            version = await self.version()
            self._schema = "shared" if () < version < _ROWS else "rows"
        with _explain_refusal():
            try:
                return await self._by_schema(self._schema, array, start, wanted)
            except RequestRefusedError as error:
                if not _is_other_schema(error):
                    raise
            self._schema = "shared" if self._schema == "rows" else "rows"
            return await self._by_schema(self._schema, array, start, wanted)

    async def _by_schema(self, schema: Schema, ids: Int32, start: int, wanted: Int32) -> Float32:
        if schema == "rows":
            return await self._matrix(ids, start, wanted.tolist(), wanted)
        parts = []
        for first, last in split_windows(wanted, await self._shared_limit()):
            union = np.unique(wanted[first:last])
            union = union[union >= 0]
            part = wanted[first:last]
            values = np.full(part.shape, -np.inf, dtype=np.float32)
            if union.size:
                # Rows behind the window are not asked for: the prompt ends where the window does.
                whole = np.broadcast_to(union, (last - first, union.size))
                matrix = await self._matrix(ids[: start + last + 1], start + first, union.tolist(), whole)
                columns = np.searchsorted(union, np.maximum(part, union[0]))
                values = np.where(part >= 0, np.take_along_axis(matrix, columns, axis=1), values)
            parts.append(values)
        return np.concatenate(parts).astype(np.float32)

    async def _shared_limit(self) -> int:
        """Find how many ids a shared list may have: the server's limit on K, from the refusal of far too many."""
        if self._limit is None:
            body = build_generate_score(await self.model_name(), np.array([1, 1], dtype=np.int32), 10_000_000)
            try:
                await self.endpoint.call(
                    "POST", ROUTE, body, decode=lambda _: None, where=self.where(), asks=RequestInfo(entries=300_000)
                )
            except KLimitError as error:
                self._limit = error.limit
        return self._limit or _SHARED

    async def _matrix(self, ids: Int32, start: int, asked: list[Any], wanted: Int32) -> Float32:
        model = await self.model_name()
        rows, columns = wanted.shape

        def build(attempt: Try) -> dict[str, Any]:
            return build_generate_candidates(model, ids, start, asked) | build_salt(attempt)

        def decode(body: bytes) -> Float32:
            return check_candidates(read_generate_candidates(body, rows=rows, columns=columns), wanted, start)

        return await self._ask_scores(ROUTE, build, decode, ids=ids, k=columns, entries=rows * columns)


def split_windows(wanted: Int32, limit: int) -> list[tuple[int, int]]:
    """Split rows into ranges, as long as possible, of at most ``limit`` distinct candidates.

    Raises:
        UnsupportedError: a row alone has more, or too many windows would be needed (each is a whole prefill).
    """
    ranges: list[tuple[int, int]] = []
    first, union = 0, set[int]()
    for row, ids in enumerate(wanted.tolist()):
        mine = {token for token in ids if token >= 0}
        if len(mine) > limit:
            raise UnsupportedError("more candidates in a row than the server takes", got=len(mine), expected=limit)
        if len(union | mine) > limit:
            ranges.append((first, row))
            first, union = row, set()
        union |= mine
    ranges.append((first, len(wanted)))
    if len(ranges) > _MAX_WINDOWS:
        raise UnsupportedError(
            "this server takes one list of candidates for all rows, and these rows share too few",
            got=f"{len(ranges)} requests for {len(wanted)} rows",
            expected=f"at most {_MAX_WINDOWS}",
            hint="vLLM 0.32 takes one list per row; or raise --max-logprobs; or use the teacher's own top K",
        )
    return ranges


def _is_other_schema(error: RequestRefusedError) -> bool:
    text = str(error)
    return "prompt_logprob_token_ids" in text and any(sign in text for sign in ("_type", "valid list", "valid integer"))


@contextlib.contextmanager
def _explain_refusal() -> Iterator[None]:
    """Raise a refusal as the error that it means on this route."""
    try:
        yield
    except RequestRefusedError as error:
        if error.got == "HTTP 404" and "no such route" in str(error):
            hint = "start vLLM with --enable-scale-out"
            raise UnsupportedError(f"the server has no {ROUTE}", where=error.where, got=error.got, hint=hint) from error
        raise
