"""vLLM's ``prompt_logprobs`` JSON to arrays by typed decoding: the reference path, and the one that explains errors.

Faster readings of the same bytes (``decode_numpy``, ``decode_numba``) hand over here whenever anything is unusual.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
import numpy as np

from topkd.clients.decoding.checks import Entries, check_reply_rows
from topkd.topk.errors import ResponseError
from topkd.topk.types import PAD_ID, Int32

Value = TypeVar("Value")
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


class Scored(msgspec.Struct):
    """The part of a ``/v1/completions`` reply that scoring reads."""

    choices: list[ScoredChoice]


def typed(body: bytes, decoder: msgspec.json.Decoder[Value]) -> Value:
    """Bytes to a typed value; whatever is wrong with them is a ResponseError."""
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


def scored_choice(body: bytes) -> ScoredChoice:
    """The only choice of a scoring reply."""
    choices = typed(body, _SCORED).choices
    if len(choices) != 1:
        raise ResponseError("wrong number of choices", got=len(choices), expected=1)
    return choices[0]


def read_prompt_rows(choice: ScoredChoice, ids: Int32, start: int) -> Entries:
    """Rows ``start + 1 ..`` of a choice's ``prompt_logprobs`` for the prompt ``ids``.

    Raises:
        AlignmentError: not one row a prompt token.
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
    """Typed rows, and the realised token of each, as arrays."""
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
        raise ResponseError("a token id or rank is too large to be one", got=str(error)) from error
    logp[listed] = np.fromiter((entry.logprob for row in rows for entry in row.values()), dtype=np.float64, count=total)
    if total and (int(ids[listed].min()) < 0 or int(ids.max()) > _MAX_ID):
        raise ResponseError(
            "a token id cannot be one", got=f"{ids[listed].min()}..{ids.max()}", expected=f"0..{_MAX_ID}"
        )
    return Entries(ids.astype(np.int32), logp, np.minimum(rank, _MAX_ID).astype(np.int32))


def as_ids(values: list[int], what: str) -> Int32:
    """A served list of token ids as int32."""
    try:
        array = np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise ResponseError(f"{what}: a token id is too large to be one") from error
    if array.size and (int(array.min()) < 0 or int(array.max()) > _MAX_ID):
        raise ResponseError(f"{what}: a token id cannot be one", got=f"{array.min()}..{array.max()}")
    return array.astype(np.int32)
