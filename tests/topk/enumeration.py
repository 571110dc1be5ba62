"""The top-K estimator's expectation by enumeration of the realised token, and what it must equal."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from topkd.topk import TopK
from topkd.topk.losses import SparseTeacher, topk_policy_gradient_loss
from topkd.topk.losses.divergence import divergence

V = 9


BETAS = [0.0, 0.3, 0.5, 0.9, 1.0]


def pair(seed: int, rows: int = 3, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, rows, V, generator=g, dtype=torch.float64)
    return logits[0], torch.log_softmax(logits[1], -1)


def support(kind: str, student: Tensor, teacher: Tensor, k: int = 3) -> Tensor:
    """[rows, K] ids chosen without looking at the realised token; the union is padded with -1."""
    best_t, best_s = teacher.topk(k).indices, student.topk(k).indices
    if kind == "teacher":
        return best_t
    if kind == "student":
        return best_s
    rows = []
    for a, b in zip(best_t.tolist(), best_s.tolist(), strict=True):
        ids = sorted(set(a) | set(b))
        rows.append(ids + [-1] * (2 * k - len(ids)))
    return torch.tensor(rows)


def sparse(ids: Tensor, teacher: Tensor, y: Tensor) -> SparseTeacher:
    listed = ids >= 0
    logp = torch.where(listed, teacher.gather(-1, ids.clamp(min=0)), -math.inf)
    tail = torch.log1p(-logp.exp().sum(-1))
    return SparseTeacher(ids, logp, tail, y, teacher.gather(-1, y[:, None]).squeeze(-1))


def estimator(logits: Tensor, ids: Tensor, teacher: Tensor, y: Tensor, **kwargs: object) -> Tensor:
    logp = torch.log_softmax(logits, -1)
    at_ids = logp.gather(-1, ids.clamp(min=0))
    chosen = logp.gather(-1, y[:, None]).squeeze(-1)
    return topk_policy_gradient_loss(at_ids, chosen, sparse(ids, teacher, y), **kwargs)


def expectation(logits: Tensor, ids: Tensor, teacher: Tensor, behavior: Tensor, **kwargs: object) -> Tensor:
    """E_{y ~ behaviour} of the estimator's gradient, by enumeration of y in every row (the rows are independent)."""
    total = torch.zeros_like(logits)
    for v in range(V):
        leaf = logits.clone().requires_grad_()
        y = torch.full((logits.shape[0],), v)
        loss = estimator(leaf, ids, teacher, y, behavior_logp=behavior[:, v], cap=None, reduction="sum", **kwargs)
        loss.backward()
        total += behavior[:, v, None].exp() * leaf.grad
    return total


def wanted_gradient(logits: Tensor, ids: Tensor, teacher: Tensor, beta: float, lam: float) -> Tensor:
    leaf = logits.clone().requires_grad_()
    logp = torch.log_softmax(leaf, -1)
    dense = divergence(teacher, logp, beta)
    total = lam * dense.sum()
    for r in range(logits.shape[0]):
        members = [v for v in ids[r].tolist() if v >= 0]
        others = [v for v in range(V) if v not in members]

        def bins(x: Tensor, inside: list[int], outside: list[int]) -> Tensor:
            return torch.cat([x[inside], torch.logsumexp(x[outside], 0)[None]])

        total = total + (1 - lam) * divergence(bins(teacher[r], members, others), bins(logp[r], members, others), beta)
    return torch.autograd.grad(total, leaf)[0]


def served(teacher: Tensor, y: list[int], k: int = 3) -> TopK:
    values, ids = teacher.topk(k)
    rows = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    exact = [float(teacher[r, v]) for r, v in enumerate(y)]
    return TopK.from_lists(rows, actual_ids=y, actual_logp=np.array(exact))
