"""SGLang's ``/generate`` replies to arrays: flat base64 where it is there, nested lists otherwise. Pure.

Lists start at token ``logprob_start_len``; their entry 0 is null whatever the start, because nothing predicts it. K
entries a row, ranked; the realised token stands beside them. JSON null is -inf or NaN (orjson writes both so): in a
list it is read as probability zero, for a realised token it cannot be told and is refused.

SGLang (0.4.6 to 0.5.23) writes the last id of the vocabulary as 0 in ``input_token_logprobs``, with the right logprob.
Such a 0 is accepted where the same reply scores that id under its own name, to the same value.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from topkd.clients.decoding.binary import read_flat_lists
from topkd.clients.decoding.checks import check_reply_rows, check_reply_vocabulary, topk_with_actual
from topkd.clients.decoding.sampled import (
    SampleRequest,
    Span,
    build_rollout,
    check_completion_ids,
    check_finish_reason,
    join_versions,
)
from topkd.clients.decoding.vllm import as_ids, typed
from topkd.topk.errors import AlignmentError, ResponseError, ServerBusyError, ServerPausedError
from topkd.topk.samples import Rollout
from topkd.topk.types import Float32, Float64, Int32, TopK

_LOWEST = -1e30  # generated -inf is written as -3.4e38
_SAME_LOGP = 1e-5  # two readings of one row of float32 logits
Triple = tuple[float | None, int, str | None]


class _Finish(msgspec.Struct):
    type: str
    message: str | None = None
    status_code: int | None = None


class _Meta(msgspec.Struct):
    input_token_logprobs: list[Triple] | None = None
    input_top_logprobs: list[list[Triple] | None] | None = None
    input_top_logprobs_val_flat_b64: bytes | None = None
    input_top_logprobs_idx_flat_b64: bytes | None = None
    input_top_logprobs_shape: list[int] | None = None
    input_top_logprobs_null_prefix: int | None = None
    input_token_ids_logprobs: list[list[Triple] | None] | None = None
    output_token_logprobs: list[Triple] | None = None
    output_top_logprobs: list[list[Triple] | None] | None = None
    finish_reason: _Finish | str | None = None
    weight_version: str | int | None = None
    weight_versions: list[Span] | None = None


class _Reply(msgspec.Struct):
    meta_info: _Meta
    output_ids: list[int] | None = None


_ONE = msgspec.json.Decoder(_Reply)
_MANY = msgspec.json.Decoder(list[_Reply] | _Reply)


def read_sglang_scores(
    body: bytes, *, ids: Int32, start: int, k: int, vocab_size: int | None = None, last_id: int | None = None
) -> tuple[TopK, int, bool]:
    """Read rows ``start ..``, how many zero-probability entries they held, and whether the arrays came flat.

    ``last_id`` is the id that the server may write as 0; the request scored it at every row to prove it.
    """
    meta = typed(body, _ONE).meta_info
    _refuse_abort(meta)
    actual_logp = _realised(meta, ids, start, last_id)
    rows = actual_logp.size
    want = k if vocab_size is None else min(k, vocab_size)
    flat = meta.input_top_logprobs_val_flat_b64 is not None
    if k == 0:
        listed, logp = np.empty((rows, 0), np.int32), np.empty((rows, 0))
    elif flat:
        listed, logp = _flat(meta, rows, want)
    else:
        listed, logp = _nested(meta.input_top_logprobs, rows, want, "input_top_logprobs")
    check_reply_vocabulary(listed, vocab_size)
    zero = logp <= _LOWEST
    logp = np.where(zero, -np.inf, logp)
    actual = ids[start + 1 :]
    topk = topk_with_actual(listed, logp, start=start, k=want, actual_ids=actual, actual_logp=actual_logp)
    return topk, int(np.count_nonzero(zero)), flat


def read_sglang_candidates(body: bytes, *, ids: Int32, start: int, union: Int32, last_id: int | None = None) -> Float32:
    """Read float32 [R, U] logprobs of the shared list ``union`` at rows ``start ..``, in its order."""
    meta = typed(body, _ONE).meta_info
    _refuse_abort(meta)
    rows = _realised(meta, ids, start, last_id).size
    if meta.input_token_ids_logprobs is None:
        raise ResponseError("the reply has no input_token_ids_logprobs", hint="the server ignored token_ids_logprob")
    found, logp = _nested(meta.input_token_ids_logprobs, rows, int(union.size), "input_token_ids_logprobs")
    order = np.argsort(found, axis=1)
    found, logp = np.take_along_axis(found, order, axis=1), np.take_along_axis(logp, order, axis=1)
    wrong = (found != union).any(axis=1)
    if wrong.any():
        raise AlignmentError(
            "the reply's candidate ids differ from the requested ones",
            where=f"row {int(np.argmax(wrong))}",
            got=found[np.argmax(wrong)][:4].tolist(),
            expected=union[:4].tolist(),
        )
    if (np.exp(logp).sum(axis=1) > 1 + 1e-3).any():
        raise ResponseError("the probabilities of the candidates add up to more than 1")
    return np.where(logp <= _LOWEST, -np.inf, logp).astype(np.float32)


def read_sglang_rollouts(body: bytes, *, asked: SampleRequest) -> list[Rollout]:
    """Read the n rollouts of a reply (an object for one, a list for more)."""
    reply = typed(body, _MANY)
    replies = reply if isinstance(reply, list) else [reply]
    if len(replies) != asked.n:
        raise ResponseError("wrong number of completions", got=len(replies), expected=asked.n)
    return [_rollout(single_reply, asked, index) for index, single_reply in enumerate(replies)]


def _rollout(reply: _Reply, asked: SampleRequest, index: int) -> Rollout:
    meta, where = reply.meta_info, f"completion {index}"
    _refuse_abort(meta)
    reason = meta.finish_reason.type if isinstance(meta.finish_reason, _Finish) else meta.finish_reason
    finish_reason = check_finish_reason(reason, where)
    if meta.output_token_logprobs is None:
        raise ResponseError("the reply has no output_token_logprobs", where=where)
    ids = as_ids([entry[1] for entry in meta.output_token_logprobs], where)
    if reply.output_ids is not None and reply.output_ids != ids.tolist():
        raise AlignmentError(
            "output_ids and output_token_logprobs disagree",
            where=where,
            got=f"{len(reply.output_ids)} ids",
            expected=ids.size,
        )
    check_completion_ids(ids, asked, where)
    logp = _numbers([entry[0] for entry in meta.output_token_logprobs], where)
    topk = None
    if asked.k:
        want = asked.k if asked.vocab_size is None else min(asked.k, asked.vocab_size)
        listed, values = _nested(meta.output_top_logprobs, ids.size, want, "output_top_logprobs", first_null=False)
        values = np.where(values <= _LOWEST, -np.inf, values)
        start = int(asked.prompt.size) - 1
        topk = topk_with_actual(listed, values, start=start, k=want, actual_ids=ids, actual_logp=logp)
    version = join_versions(meta.weight_versions) or ("" if meta.weight_version is None else str(meta.weight_version))
    return build_rollout(asked, ids, logp, finish_reason, topk=topk, version=version)


def _refuse_abort(meta: _Meta) -> None:
    finish = meta.finish_reason
    if isinstance(finish, _Finish) and finish.type == "abort":
        # Without a status it was told to abort, as when it is paused for new weights; with one it could not go on.
        kind = ServerBusyError if finish.status_code else ServerPausedError
        raise kind("the server aborted the request", got=finish.message)


def _realised(meta: _Meta, ids: Int32, start: int, last_id: int | None) -> Float64:
    entries = meta.input_token_logprobs
    if entries is None:
        raise ResponseError("the reply has no input_token_logprobs", hint="the server ignored return_logprob")
    check_reply_rows(len(entries), int(ids.size) - start)
    shown, wanted = [entry[1] for entry in entries], ids[start:].tolist()
    if shown != wanted and shown != [0 if token == last_id else token for token in wanted]:
        at = next(i for i, (a, b) in enumerate(zip(shown, wanted, strict=True)) if a != b)
        raise AlignmentError(
            "the server scored another prompt", where=f"position {start + at}", got=shown[at], expected=wanted[at]
        )
    logp = _numbers([entry[0] for entry in entries[1:]], "input_token_logprobs")
    if last_id is not None:
        _check_last_id(meta, ids[start + 1 :], logp, last_id)
    return logp


def _check_last_id(meta: _Meta, actual_ids: Int32, actual_logp: Float64, last_id: int) -> None:
    """Check that the rows which may show 0 for ``last_id`` hold the logprob of ``last_id``."""
    lists = (meta.input_token_ids_logprobs or [])[1:]
    for row in np.flatnonzero(actual_ids == last_id).tolist():
        entries = (lists[row] if row < len(lists) else None) or []
        named = next((entry[0] for entry in entries if entry[1] == last_id), None)
        if named is None or not abs(max(named, _LOWEST) - max(float(actual_logp[row]), _LOWEST)) <= _SAME_LOGP:
            raise AlignmentError(
                "the server shows token 0 and its logprob is not that of the vocabulary's last id",
                where=f"row {row}", got=float(actual_logp[row]), expected=named,
            )  # fmt: skip


def is_last_id_hidden(body: bytes, ids: Int32, start: int) -> bool:
    """Return whether a score shows 0 for the largest id of its prompt and every other id as it is."""
    entries = typed(body, _ONE).meta_info.input_token_logprobs or []
    largest = int(ids.max())
    expected = [0 if token == largest else token for token in ids[start:].tolist()]
    return largest > 0 and largest in ids[start:] and [entry[1] for entry in entries] == expected


def _numbers(values: list[float | None], where: str) -> Float64:
    logp = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    if np.isnan(logp).any():
        row = int(np.argmax(np.isnan(logp)))
        raise ResponseError("a realised token's logprob is null", where=f"{where}, row {row}", expected="a number")
    return np.where(logp <= _LOWEST, -np.inf, logp)


def _flat(meta: _Meta, rows: int, k: int) -> tuple[Int32, Float64]:
    values, indices, shape = (
        meta.input_top_logprobs_val_flat_b64,
        meta.input_top_logprobs_idx_flat_b64,
        meta.input_top_logprobs_shape,
    )
    if values is None or indices is None or shape is None or len(shape) != 2:
        raise ResponseError("a flat list without its indices or its shape", got=shape)
    # The null prefix is counted, not stored; a server that stores it as rows shows them in the shape.
    skipped = shape[0] - rows
    if shape[1] != k or skipped not in {0, 1}:
        raise AlignmentError("flat top-K: another shape", got=shape, expected=[rows, k])
    ids, logp = read_flat_lists(values[skipped * k * 4 :], indices[skipped * k * 4 :], rows=rows, k=k)
    return ids, logp.astype(np.float64)


def _nested(
    lists: list[list[Triple] | None] | None, rows: int, k: int, what: str, *, first_null: bool = True
) -> tuple[Int32, Float64]:
    if lists is None:
        raise ResponseError(f"the reply has no {what}")
    kept: list[Any] = lists[1:] if first_null else lists
    check_reply_rows(len(kept), rows)
    short = next((row for row, entries in enumerate(kept) if entries is None or len(entries) != k), None)
    if short is not None:
        got = None if kept[short] is None else len(kept[short])
        raise ResponseError("wrong number of entries", where=f"{what}, row {short}", got=got, expected=k)
    flat = [entry for entries in kept for entry in entries]
    ids = as_ids([entry[1] for entry in flat], what).reshape(rows, k)
    # null stands for a value JSON cannot hold; the mass and order checks of the row see whether it was NaN's neighbour.
    logp = np.array([-np.inf if entry[0] is None else entry[0] for entry in flat], dtype=np.float64).reshape(rows, k)
    if logp.size and float(logp.max()) > 1e-3:
        raise ResponseError(f"{what}: a logprob is above 0", got=float(logp.max()), expected="<= 0")
    return ids, logp
