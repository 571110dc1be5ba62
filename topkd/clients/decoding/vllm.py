"""vLLM's ``prompt_logprobs`` JSON to arrays: by the reading that costs the process least, or by typed decoding.

Typed decoding is the reference path, and the one that explains errors: the faster readings of the same bytes
(``vllm_numpy``, ``vllm_numba``) hand over to it whenever anything is unusual.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import msgspec
import numpy as np

from topkd.clients.decoding import vllm_numba, vllm_numpy
from topkd.clients.decoding.checks import Entries, Ranked, build_ranked_scores, build_scores, check_reply_rows
from topkd.topk.errors import AlignmentError, ResponseError, ServerPausedError
from topkd.topk.types import PAD_ID, Int32, TopK

Value = TypeVar("Value")
Reader = Callable[[bytes, Int32, int, int], tuple[Ranked, bytes] | None]
_WORTH_IT = 16_384  # bytes below which the typed decoder is as fast
COMPILING_PAYS = (
    1 << 28
)  # bytes that NumPy reads first: by then it took about a second longer, which loading numba costs
_MAX_ID = int(np.iinfo(np.int32).max)


class Logprob(msgspec.Struct):
    """One entry of a row; ``decoded_token`` is for display and not read."""

    logprob: float
    rank: int | None = None


Row = dict[int, Logprob]


class ScoredChoice(msgspec.Struct):
    """The part of a choice that scoring reads."""

    index: int = 0
    prompt_logprobs: list[Row | None] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None


class Ended(msgspec.Struct):
    """Why a choice of an ``/inference/v1/generate`` reply ended."""

    finish_reason: str | None = None


class GeneratedScore(ScoredChoice):
    """The part of an ``/inference/v1/generate`` reply that scoring reads."""

    choices: list[Ended] = []


class Scored(msgspec.Struct):
    """The part of a ``/v1/completions`` reply that scoring reads."""

    choices: list[ScoredChoice]


def typed(body: bytes, decoder: msgspec.json.Decoder[Value]) -> Value:
    """Decode bytes to a typed value; whatever is wrong with them is a ResponseError."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ResponseError(_unreadable(body, error), got=_glimpse(body), hint=_HINT) from error


_NOT_FINITE = re.compile(rb"[:,\[]\s*-?(NaN|Infinity)")
_HINT = "is this the route of an OpenAI-compatible server, and does a proxy change replies?"


def _unreadable(body: bytes, error: Exception) -> str:
    text = str(error)
    causes = (
        (not body.strip(), "the reply is empty"),
        (body.lstrip()[:1] == b"<", "the reply is an HTML page, not JSON"),
        ("`float`, got `null`" in text, f"a logprob is null: {text}"),
        (isinstance(error, msgspec.ValidationError), f"the reply has another shape than it should: {text}"),
        (bool(_NOT_FINITE.search(body)), "a logprob is NaN or infinite, which is not JSON"),
        ("truncated" in text, "the reply is cut off: incomplete JSON"),
    )
    return next((what for holds, what in causes if holds), f"the reply is not valid JSON: {text}")


def _glimpse(body: bytes) -> str:
    text = body[:80].decode("utf-8", "replace")
    return f"{len(body)} bytes: {' '.join(text.split())!r}"


_SCORED = msgspec.json.Decoder(Scored)
_GENERATED = msgspec.json.Decoder(GeneratedScore)


def read_scored_choice(body: bytes) -> ScoredChoice:
    """Read the only choice of a scoring reply."""
    choices = typed(body, _SCORED).choices
    if len(choices) != 1:
        raise ResponseError("wrong number of choices", got=len(choices), expected=1)
    return choices[0]


def read_generated_choice(body: bytes) -> ScoredChoice:
    """Read a scoring reply of ``/inference/v1/generate``, with the end of its only choice."""
    score = typed(body, _GENERATED)
    score.finish_reason = next((choice.finish_reason for choice in score.choices), None)
    return score


def refuse_abort(finish_reason: str | None, where: str = "") -> None:
    """Refuse what a server that is being paused (or drained) did not finish: a 200, and not an answer.

    Raises:
        ServerPausedError: the request is to be sent again.
    """
    if finish_reason == "abort":
        raise ServerPausedError("the server aborted the request", where=where, hint="was it paused for new weights?")


def read_prompt_rows(choice: ScoredChoice, ids: Int32, start: int) -> Entries:
    """Read rows ``start + 1 ..`` of a choice's ``prompt_logprobs`` for the prompt ``ids``.

    Raises:
        AlignmentError: not one row per prompt token.
        ResponseError: the field is missing or null, or a row that was asked for is null or empty.
    """
    rows = choice.prompt_logprobs
    if rows is None:
        raise ResponseError(
            "the reply has no prompt_logprobs",
            got="null",
            expected=f"{ids.size} rows",
            hint="the server ignored the field: it cannot score prompts on this route",
        )
    check_reply_rows(len(rows), ids.size)
    wanted = rows[start + 1 :]
    for offset, row in enumerate(wanted):
        if not row:
            where = f"row {offset}, predicting position {start + 1 + offset}"
            raise ResponseError("a row is null or empty", where=where, got=row, expected="a list of logprobs")
    return entries_of([row for row in wanted if row], ids[start + 1 :].tolist())


def entries_of(rows: list[Row], actual: list[int]) -> Entries:
    """Convert typed rows, and the realised token of each, to arrays."""
    counts = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    width, total = int(counts.max(initial=0)), int(counts.sum())
    listed = np.arange(width) < counts[:, None]
    ids = np.full((len(rows), width), PAD_ID, dtype=np.int64)
    logp = np.full((len(rows), width), -np.inf)
    served = [row.get(token) for row, token in zip(rows, actual, strict=True)]
    try:
        ids[listed] = np.fromiter((token for row in rows for token in row), dtype=np.int64, count=total)
        rank = np.array([entry.rank or 0 if entry else 0 for entry in served], dtype=np.int64)
    except OverflowError as error:
        raise ResponseError("a token id or rank is too large", got=str(error)) from error
    logp[listed] = np.fromiter((entry.logprob for row in rows for entry in row.values()), dtype=np.float64, count=total)
    if total and (int(ids[listed].min()) < 0 or int(ids.max()) > _MAX_ID):
        raise ResponseError(
            "a token id is out of range", got=f"{ids[listed].min()}..{ids.max()}", expected=f"0..{_MAX_ID}"
        )
    return Entries(ids.astype(np.int32), logp, np.minimum(rank, _MAX_ID).astype(np.int32))


def as_ids(values: list[int], what: str) -> Int32:
    """Convert a served list of token ids to int32."""
    try:
        array = np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise ResponseError(f"{what}: a token id is too large") from error
    if array.size and (int(array.min()) < 0 or int(array.max()) > _MAX_ID):
        raise ResponseError(f"{what}: a token id is out of range", got=f"{array.min()}..{array.max()}")
    return array.astype(np.int32)


class FastReader:
    """Reads with NumPy, and with numba (where it is installed) once loading it pays; to the same bits."""

    def __init__(self, pays: int = COMPILING_PAYS) -> None:
        self._left = pays

    def read(self, body: bytes, ids: Int32, start: int, k: int) -> tuple[Ranked, bytes] | None:
        """Read rows, as ``vllm_numpy.read_rows``."""
        if self._left > 0 or not vllm_numba.available():
            self._left -= len(body)
            return vllm_numpy.read_rows(body, ids, start, k)
        return vllm_numba.read_rows_compiled(body, ids, start, k)


_FAST = FastReader()


def read_vllm_scores(
    body: bytes, *, ids: Int32, start: int, k: int, vocab_size: int | None = None
) -> tuple[TopK, int, bool]:
    """Read checked rows of a ``/v1/completions`` reply.

    Returns:
        The rows, how many zero-probability sentinels they held, and whether the fast reading was taken.
    """
    return _read_scores(body, read_scored_choice, ids, start, k, vocab_size)


def read_generate_scores(
    body: bytes, *, ids: Int32, start: int, k: int, vocab_size: int | None = None
) -> tuple[TopK, int, bool]:
    """Read checked rows of an ``/inference/v1/generate`` reply, as ``read_vllm_scores`` does."""
    return _read_scores(body, read_generated_choice, ids, start, k, vocab_size)


def _read_scores(  # noqa: PLR0917 - private, and called twice
    body: bytes, read: Callable[[bytes], ScoredChoice], ids: Int32, start: int, k: int, vocab_size: int | None
) -> tuple[TopK, int, bool]:
    fast = _FAST.read(body, ids, start, k) if len(body) >= _WORTH_IT else None
    choice = read(body if fast is None else fast[1])
    refuse_abort(choice.finish_reason)
    check_prompt(choice.prompt_token_ids, ids)
    if fast is None:
        return *build_scores(read_prompt_rows(choice, ids, start), ids, start, k, vocab_size), False
    return *build_ranked_scores(fast[0], ids, start, vocab_size), True


def check_prompt(echoed: list[int] | None, ids: Int32) -> None:
    """Refuse a reply whose server states that it scored another prompt."""
    if echoed is not None and echoed != ids.tolist():
        at = next(
            (i for i, (a, b) in enumerate(zip(echoed, ids.tolist(), strict=False)) if a != b),
            min(len(echoed), ids.size),
        )
        raise AlignmentError(
            "the server scored another prompt",
            where=f"position {at}",
            got=f"{len(echoed)} tokens, {echoed[at : at + 3]} there",
            expected=f"{ids.size} tokens, {ids[at : at + 3].tolist()} there",
        )
