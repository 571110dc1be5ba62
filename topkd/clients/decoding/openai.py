"""Chat completions' logprobs to ids: by an id where the server gives one, else by bytes. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import msgspec
import numpy as np

from topkd.clients.decoding.byte_map import ByteMap
from topkd.clients.decoding.checks import topk_with_actual
from topkd.clients.decoding.sampled import SampleRequest, Span, build_rollout, check_finish_reason, join_versions
from topkd.clients.decoding.vllm import typed
from topkd.topk.errors import AlignmentError, ResponseError
from topkd.topk.samples import Rollout
from topkd.topk.types import PAD_ID, Float64, Int32, TopK

_PREFIX = "token_id:"
_LOWEST = -9000.0  # OpenAI writes -9999 for "not even close", vLLM for -inf
_MAX_ID = int(np.iinfo(np.int32).max)


class _Entry(msgspec.Struct):
    logprob: float | None
    token: str = ""
    bytes: list[int] | None = None
    id: int | None = None  # llama.cpp


class _Position(_Entry):
    top_logprobs: list[_Entry] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Position] | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Message | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    weight_versions: list[Span] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


_DECODER = msgspec.json.Decoder(_Reply)


@dataclass(frozen=True, slots=True)
class Recovered:
    """Rollouts read back, and what was left out on the way."""

    rollouts: list[Rollout]
    listed_entries: int
    ambiguous_entries: int
    ambiguous_rollouts: int


def read_chat_rollouts(body: bytes, *, asked: SampleRequest, table: ByteMap | None) -> Recovered:
    """Read the draws of a reply whose every token names one id.

    Raises:
        ResponseError: no logprobs, or values that cannot be logprobs.
        AlignmentError: the server's prompt has another length than ours.
    """
    reply = typed(body, _DECODER)
    counted = reply.usage.prompt_tokens if reply.usage else None
    if counted is not None and counted != asked.prompt.size:
        raise AlignmentError(
            "the server's prompt has another length than prompt_ids",
            got=counted,
            expected=int(asked.prompt.size),
            hint="render the messages with the served model's own chat template",
        )
    if len(reply.choices) != asked.n:
        raise ResponseError("wrong number of choices", got=len(reply.choices), expected=asked.n)
    rollouts: list[Rollout] = []
    listed = ambiguous = lost = 0
    for choice in sorted(reply.choices, key=lambda item: item.index):
        content = choice.logprobs.content if choice.logprobs else None
        if not content:
            raise ResponseError(
                "the reply has no logprobs",
                where=f"choice {choice.index}",
                hint="the model or the provider behind the server gives none",
            )
        check_finish_reason(choice.finish_reason, f"choice {choice.index}")
        ids = [find_entry_id(entry, table) for entry in content]
        rows = [_row(position, table) for position in content]
        listed += sum(row.served for row in rows)
        ambiguous += sum(row.dropped for row in rows)
        if any(token is None for token in ids):
            lost += 1
            continue
        rollouts.append(_rollout(choice, content, np.array(ids, dtype=np.int32), rows, asked))
    return Recovered(rollouts, listed, ambiguous, lost)


def find_entry_id(entry: _Entry, table: ByteMap | None) -> int | None:
    """Find the token id of an entry: stated, or the only one with its bytes; None when there is no such."""
    if entry.id is not None and 0 <= entry.id <= _MAX_ID:
        return entry.id
    if entry.token.startswith(_PREFIX) and entry.token[len(_PREFIX) :].isdecimal():
        stated = int(entry.token[len(_PREFIX) :])
        return stated if stated <= _MAX_ID else None
    if table is None:
        return None
    if entry.bytes is None:
        return None if "�" in entry.token else table.only_id(entry.token.encode())
    try:
        return table.only_id(bytes(entry.bytes))
    except ValueError:  # a number that is no byte
        return None


@dataclass(frozen=True, slots=True)
class _Row:
    ids: list[int]
    logp: list[float]
    served: int
    dropped: int


def _row(position: _Position, table: ByteMap | None) -> _Row:
    """Cut a list before its first entry without an id: what is kept is still the top of the distribution."""
    entries = [entry for entry in position.top_logprobs or [] if entry.logprob is not None and entry.logprob > _LOWEST]
    entries.sort(key=lambda entry: -(entry.logprob or 0.0))
    served = position.top_logprobs or []
    if len(served) > 1 and _same(served[0], position) and (served[0].logprob or 0.0) < (served[-1].logprob or 0.0):
        # vLLM puts the sampled token first and gives it one of the K places: behind the last is a gap.
        entries = [entry for entry in entries if entry is not served[0]]
    ids: list[int] = []
    logp: list[float] = []
    for entry in entries:
        token = find_entry_id(entry, table)
        if token is None or token in ids:
            break
        ids.append(token)
        logp.append(cast("float", entry.logprob))
    dropped = sum(find_entry_id(entry, table) is None for entry in entries)
    return _Row(ids, logp, len(served), dropped)


def _same(item: _Entry, other: _Entry) -> bool:
    return (item.token, item.bytes, item.id) == (other.token, other.bytes, other.id)


def _rollout(choice: _Choice, content: list[_Position], ids: Int32, rows: list[_Row], asked: SampleRequest) -> Rollout:
    where = f"choice {choice.index}"
    text = (choice.message.content or "" if choice.message else "").rstrip("�").encode()
    if all(position.bytes is not None for position in content):
        spelt = b"".join(_bytes(position) for position in content)
        if text not in spelt:
            # llama.cpp gives a token that ends inside a character no entry of its own.
            raise AlignmentError(
                "the listed tokens do not spell the answer", where=where, got=f"{len(spelt)} bytes", expected=len(text)
            )
    if ids.size > asked.params.max_tokens:
        raise ResponseError("too many tokens", where=where, got=ids.size, expected=asked.params.max_tokens)
    logp = np.array([np.nan if p.logprob is None else p.logprob for p in content], dtype=np.float64)
    if np.isnan(logp).any() or (logp <= _LOWEST).any() or (logp > 1e-3).any():
        raise ResponseError("the logprob of a sampled token is invalid", where=where, expected="a finite number <= 0")
    topk = _topk(rows, ids, logp, asked) if asked.k else None
    finish_reason, version = check_finish_reason(choice.finish_reason), join_versions(choice.weight_versions)
    return build_rollout(asked, ids, logp, finish_reason, topk=topk, version=version)


def _bytes(entry: _Entry) -> bytes:
    try:
        return bytes(entry.bytes or ())
    except ValueError as error:
        raise ResponseError("a token's bytes hold a number that is no byte", got=str(error)) from error


def _topk(rows: list[_Row], ids: Int32, logp: Float64, asked: SampleRequest) -> TopK:
    listed = np.full((len(rows), asked.k), PAD_ID, dtype=np.int32)
    values = np.full((len(rows), asked.k), -np.inf)
    for at, row in enumerate(rows):
        width = min(asked.k, len(row.ids))
        listed[at, :width], values[at, :width] = row.ids[:width], row.logp[:width]
    start = int(asked.prompt.size) - 1
    return topk_with_actual(listed, values, start=start, k=asked.k, actual_ids=ids, actual_logp=logp)
