"""Every loss on logits under one signature, random pairs of logits, and a slow divergence."""

from __future__ import annotations

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from topkd.topk.losses import (
    KDLoss,
    SparseTeacher,
    entropy_aware_opd_loss,
    eopd_loss,
    generalized_jsd_loss,
    sparse_divergence_loss,
    taid_loss,
)
from topkd.topk.losses.divergence import log_tail_torch

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


seeds = st.integers(0, 10**6)


inner = st.floats(0.02, 0.98)


pairs = settings(max_examples=40, deadline=None)


def pair(seed: int, shape: tuple[int, ...] = (2, 3, 7), scale: float = 2.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    both = scale * torch.randn(2, *shape, generator=g, dtype=torch.float64)
    return both[0].clone().requires_grad_(), both[1].clone()


def h2(beta: float) -> float:
    return -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)


def slow(teacher: Tensor, student: Tensor, beta: float) -> float:
    """One position from its probabilities, term by term in Python floats."""
    t, s = torch.softmax(teacher, -1).tolist(), torch.softmax(student, -1).tolist()

    def kl(p: list[float], q: list[float]) -> float:
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    if beta in (0.0, 1.0):
        return kl(t, s) if beta == 0.0 else kl(s, t)
    m = [beta * a + (1 - beta) * b for a, b in zip(t, s, strict=True)]
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def jsd(student: Tensor, teacher: Tensor, beta: float, **kwargs: object) -> Tensor:
    return generalized_jsd_loss(student, teacher, beta=beta, **kwargs)


def teacher_rows(teacher: Tensor, k: int) -> SparseTeacher:
    logp = torch.log_softmax(teacher.double(), -1).reshape(-1, teacher.shape[-1])
    top, ids = logp.topk(k)
    n = ids.shape[0]
    return SparseTeacher(ids, top, log_tail_torch(top), torch.full((n,), -1), torch.full((n,), math.nan).double())


LOSSES = {
    **{f"jsd {beta}": (lambda s, t, m, beta=beta, **kw: jsd(s, t, beta, labels=m, **kw)) for beta in BETAS},
    "jsd top_k": lambda s, t, m, **kw: jsd(s, t, 0.5, labels=m, top_k=3, **kw),
    "jsd top_k bucket": lambda s, t, m, **kw: jsd(s, t, 0.0, labels=m, top_k=3, tail="bucket", **kw),
    "jsd token_clip": lambda s, t, m, **kw: jsd(s, t, 0.0, labels=m, token_clip=0.05, **kw),
    "jsd tempered": lambda s, t, m, **kw: jsd(s, t, 0.3, labels=m, temperature=2.5, **kw),
    **{f"taid {t}": (lambda s, z, m, t=t, **kw: taid_loss(s, z, m, t=t, **kw)) for t in (0.0, 1.0)},
    "kd": KDLoss(),
    "entropy aware": lambda s, t, m, **kw: entropy_aware_opd_loss(s, t, labels=m, **kw),
    **{
        f"sparse {tail} {beta}": (
            lambda s, t, m, tail=tail, beta=beta, **kw: sparse_divergence_loss(
                s, teacher_rows(t.nan_to_num(), 3), m, beta=beta, tail=tail, **kw
            )
        )
        for tail in ("bucket", "renormalise")
        for beta in (0.0, 0.5, 1.0)
    },
}


MOVING = {
    "taid": lambda s, t, m, **kw: taid_loss(s, t, m, t=0.4, **kw),
    "eopd": lambda s, t, m, **kw: eopd_loss(s, t, mask=m, sampled_ids=torch.zeros(s.shape[:-1]).long(), **kw),
}


EVERY = {**LOSSES, **MOVING}
