"""Prompt scores in row chunks: top K, the realised token's logprob and rank, candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from topkd.serve.engine.jobs import EngineJob, PromptScores
from topkd.serve.model.backbone import Backbone


@dataclass(slots=True)
class RowScores:
    """Scores of N rows on the CPU."""

    ids: Tensor  # [N, K]
    logp: Tensor  # [N, K]
    actual_logp: Tensor  # [N]
    actual_rank: Tensor  # [N]
    candidates: Tensor | None  # [N, C]


def score_rows(
    backbone: Backbone, hidden_NH: Tensor, actual_N: Tensor, k: int, candidates_NC: Tensor | None = None
) -> RowScores:
    """Score the next tokens of ``hidden_NH``, one chunk of logits at a time.

    The rank counts logits at least as large as the realised one, itself included, as vLLM does: 1 is the likeliest.
    """
    parts = [
        _score_chunk(
            backbone.logits(hidden_NH[rows]), actual_N[rows], k, None if candidates_NC is None else candidates_NC[rows]
        )
        for rows in backbone.chunks(len(hidden_NH))
    ]
    ids, logp, actual_logp, actual_rank, candidates = zip(*parts, strict=True)
    return RowScores(
        torch.cat(ids).cpu(),
        torch.cat(logp).cpu(),
        torch.cat(actual_logp).cpu(),
        torch.cat(actual_rank).cpu(),
        None if candidates_NC is None else torch.cat([part for part in candidates if part is not None]).cpu(),
    )


def count_true(flags_NV: Tensor) -> Tensor:
    """Count the true values of each row. Floats add them five times faster, and exactly up to 2^24."""
    return flags_NV.float().sum(-1).long()


def _score_chunk(
    logits_NV: Tensor, actual_N: Tensor, k: int, candidates_NC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    lse_N1 = logits_NV.logsumexp(-1, keepdim=True)
    chosen_N1 = logits_NV.gather(1, actual_N[:, None])
    rank_N = count_true(logits_NV >= chosen_N1)
    top = logits_NV.topk(k, dim=-1) if k else None
    top_ids, top_logit = (
        (top.indices, top.values) if top is not None else (actual_N.new_empty(len(actual_N), 0), chosen_N1[:, :0])
    )
    wanted = None
    if candidates_NC is not None:
        picked = logits_NV.gather(1, candidates_NC.clamp(min=0)) - lse_N1
        wanted = picked.masked_fill(candidates_NC < 0, -torch.inf)
    return top_ids, top_logit - lse_N1, (chosen_N1 - lse_N1)[:, 0], rank_N, wanted


def score_prompts(
    backbone: Backbone, jobs: Sequence[EngineJob], hidden_BTH: Tensor
) -> list[tuple[PromptScores | None, np.ndarray | None]]:
    """Return (prompt scores, candidate logprobs) of each job, None where it asked for none."""
    spans = [_span(job) for job in jobs]
    wide = max((job.prompt_logprobs or 0 for job in jobs), default=0)
    columns = max((job.candidates.shape[1] for job in jobs if job.candidates is not None), default=0)
    device = hidden_BTH.device
    hidden, actual, candidates = [], [], []
    for row, (job, span) in enumerate(zip(jobs, spans, strict=True)):
        if span is None:
            continue
        hidden.append(hidden_BTH[row, span])
        actual.append(torch.tensor(job.ids[span.start + 1 : span.stop + 1], dtype=torch.long, device=device))
        asked = torch.full((span.stop - span.start, columns), -1, dtype=torch.long)
        if job.candidates is not None:
            asked[job.start - span.start :, : job.candidates.shape[1]] = torch.from_numpy(
                job.candidates.astype(np.int64)
            )
        candidates.append(asked)
    if not hidden:
        return [(None, None)] * len(jobs)
    scores = score_rows(
        backbone, torch.cat(hidden), torch.cat(actual), wide, torch.cat(candidates).to(device) if columns else None
    )
    results: list[tuple[PromptScores | None, np.ndarray | None]] = []
    first = 0
    for job, span in zip(jobs, spans, strict=True):
        if span is None:
            results.append((None, None))
            continue
        rows = slice(first, first := first + span.stop - span.start)
        results.append((_prompt_scores(job, scores, rows), _candidate_scores(job, scores, rows, span)))
    return results


def _span(job: EngineJob) -> slice | None:
    """Return the source positions to score: all but the last, or from ``start`` for candidates only."""
    last = len(job.ids) - 1
    if job.prompt_logprobs is not None:
        return slice(0, last) if last else None
    return slice(job.start, last) if job.candidates is not None else None


def _prompt_scores(job: EngineJob, scores: RowScores, rows: slice) -> PromptScores | None:
    if job.prompt_logprobs is None:
        return None
    k = job.prompt_logprobs
    parts = (scores.ids[rows, :k], scores.logp[rows, :k], scores.actual_logp[rows], scores.actual_rank[rows])
    return PromptScores(*(part.numpy() for part in parts))


def _candidate_scores(job: EngineJob, scores: RowScores, rows: slice, span: slice) -> np.ndarray | None:
    if job.candidates is None or scores.candidates is None:
        return None
    part = scores.candidates[rows.start + job.start - span.start : rows.stop, : job.candidates.shape[1]]
    return np.ascontiguousarray(part.numpy())
