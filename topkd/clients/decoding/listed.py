"""Rows whose realised token stands beside the list, not in it: SGLang, Fireworks, chat, Tinker. Pure."""

from __future__ import annotations

import numpy as np

from topkd.clients.decoding.checks import build_sorted_scores
from topkd.topk.errors import AlignmentError, ResponseError
from topkd.topk.types import MASS_TOLERANCE, Float32, Float64, Int32, TopK

_SAME = 1e-3
_LOWEST = -1e30  # dialects turn their sentinels for zero probability into -inf before


def topk_with_actual(ids: Int32, logp: Float64, *, start: int, k: int, actual_ids: Int32, actual_logp: Float64) -> TopK:
    """``TopK`` of lists (-1 pads) and realised tokens that were served apart, after a check that they agree.

    A realised token that is listed must have one logprob, and one that is not must not beat the list: rows that belong
    to another position break this almost surely.

    Raises:
        AlignmentError: they contradict each other.
        ResponseError: a value that is no logprob.
    """
    for values in (logp, actual_logp):
        bad = np.isnan(values) | (values > _SAME) | ((values < _LOWEST) & ~np.isneginf(values))
        if bad.any():
            raise ResponseError("a value is no logprob", got=float(values[bad][0]), expected="a number <= 0")
    topk = build_sorted_scores(ids, logp, start=start, k=k, actual_ids=actual_ids, actual_logp=actual_logp)
    if not topk.k:
        return topk
    hit = topk.ids == topk.actual_ids[:, None]
    inside = hit.any(axis=1)
    listed = np.where(hit, topk.logp, -np.inf).max(axis=1)
    with np.errstate(invalid="ignore"):
        differs = inside & (np.abs(listed - topk.actual_logp) > _SAME)
        # Only a full list says that everything outside it is less probable.
        beats = ~inside & topk.listed.all(axis=1) & (topk.actual_logp > topk.logp[:, -1] + _SAME)
    wrong = differs | beats
    if wrong.any():
        row = int(np.argmax(wrong))
        other = float(listed[row] if inside[row] else topk.logp[row, -1])
        raise AlignmentError(
            "the list and the realised token's logprob contradict each other",
            where=f"row {row}, predicting position {start + row + 1}",
            got=f"{float(topk.actual_logp[row]):.6g} beside {other:.6g}",
        )
    return topk


def check_candidates(values: Float32, wanted: Int32, start: int) -> Float32:
    """Candidates' logprobs [R, K], pads checked to be -inf and a row's distinct ids to hold at most all probability."""
    pads = wanted < 0
    if not np.isneginf(values[pads]).all():
        raise ResponseError("a pad (-1) of the candidates came back with a logprob")
    order = np.argsort(wanted, axis=1, kind="stable")
    ids, logp = np.take_along_axis(wanted, order, axis=1), np.take_along_axis(values, order, axis=1)
    p = np.exp(logp, dtype=np.float64)
    p[:, 1:][ids[:, 1:] == ids[:, :-1]] = 0.0
    mass = p.sum(axis=1)
    if (mass > 1 + MASS_TOLERANCE).any():
        row = int(np.argmax(mass > 1 + MASS_TOLERANCE))
        raise ResponseError(
            "candidates hold more than all probability", where=f"row {row}, position {start + row + 1}", got=mass[row]
        )
    return values
