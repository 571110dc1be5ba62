"""Random logits, every loss on them, and the closed-form gradient: shared by the torch invariants."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    topk_policy_gradient_loss,
)
from topkd.topk.losses.divergence import log_tail_torch

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)
EPS = 1e-9
betas = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
interior = st.sampled_from([0.1, 0.3, 0.5, 0.9])
lams = st.sampled_from([0.0, 0.3, 1.0])

Loss = Callable[..., Tensor]
# every loss on logits, as loss(student, teacher, mask) with the mean over valid tokens
LOSSES: dict[str, Loss] = {
    "jsd": generalized_jsd_loss,
    "forward": lambda s, t, m=None: generalized_jsd_loss(s, t, m, beta=0.0),
    "reverse": lambda s, t, m=None: generalized_jsd_loss(s, t, m, beta=1.0),
    "top_k": lambda s, t, m=None: generalized_jsd_loss(s, t, m, top_k=2, tail="bucket"),
    "taid": lambda s, t, m=None: taid_loss(s, t, m, t=0.3),
    "entropy_aware": lambda s, t, m=None: entropy_aware_opd_loss(s, t, labels=m),
    "eopd": lambda s, t, m=None: eopd_loss(s, t, mask=m, sampled_ids=ids_for(s)),
    "kd": lambda s, t, m=None: KDLoss()(s, t, m),
    "sparse": lambda s, t, m=None: sparse_divergence_loss(s, listed(t, 2), m),
    "policy": lambda s, t, m=None: policy(s, t, m, lam=1.0),
}
names = st.sampled_from(sorted(LOSSES))


@st.composite
def pairs(draw: st.DrawFn, *, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Student and teacher logits [rows, V]: flat, peaked, alike or unrelated."""
    vocab = draw(st.integers(3, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    scale, near = draw(st.sampled_from([0.3, 1.0, 4.0])), draw(st.sampled_from([0.0, 0.9]))
    base, other = torch.randn(2, rows, vocab, generator=g, dtype=torch.float64)
    return scale * base, scale * (near * base + math.sqrt(1 - near**2) * other)


def ids_for(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[0]) % logits.shape[1]


def listed(teacher: Tensor, k: int, y: Tensor | None = None) -> SparseTeacher:
    """The teacher's k best ids; rows of nan become holes."""
    logp = torch.log_softmax(teacher, -1)
    top, ids = logp.topk(min(k, logp.shape[-1]), -1)
    hole = torch.isnan(top)
    ids, top = ids.masked_fill(hole, -1), top.masked_fill(hole, -math.inf)
    y = ids_for(teacher) if y is None else y
    return SparseTeacher(ids, top, log_tail_torch(top), y, logp.gather(-1, y[:, None])[:, 0])


def policy(student: Tensor, teacher: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    """From the logprobs: the model's softmax before the loss would itself spread a nan, so it sees valid rows only."""
    known = torch.ones(len(student), dtype=torch.bool) if mask is None else mask
    rows, logp = listed(teacher, 2), torch.log_softmax(torch.where(known[:, None], student, 0.0), -1)
    logp = torch.where(known[:, None], logp, math.nan)
    at_ids, actual = logp.gather(-1, rows.ids.clamp(min=0)), logp.gather(-1, rows.actual_ids[:, None])[:, 0]
    return topk_policy_gradient_loss(at_ids, actual, rows, mask, **options)


def value_and_grad(loss: Loss, student: Tensor, *rest: object) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *rest)
    return value.item(), torch.autograd.grad(value, leaf)[0]


def closed_form(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """d GJS_beta / d student logits, row by row (MATH 2)."""
    s, t = torch.softmax(student, -1), torch.softmax(teacher, -1)
    if beta == 0.0:
        return s - t
    ratio = (s / t).log() if beta == 1.0 else (s / (beta * t + (1 - beta) * s)).log()
    return (1.0 if beta == 1.0 else 1 - beta) * s * (ratio - (s * ratio).sum(-1, keepdim=True))
