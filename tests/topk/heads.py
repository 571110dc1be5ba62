"""Heads, ids and teacher rows for the fused losses, and a probe of what they make."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from topkd.topk.losses import (
    SparseTeacher,
)

SHAPES = [(1, 3, 2, 1), (7, 5, 33, 4), (37, 16, 211, 5), (64, 8, 127, 127)]  # N, H, V, K


def head(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    n, h, v, k = shape
    g = torch.Generator().manual_seed(seed)

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    ids = torch.rand(n, v, generator=g).topk(k).indices
    if k > 1:
        ids[0, -1] = -1
    return {"hidden": leaf(n, h), "weight": leaf(v, h), "bias": leaf(v), "ids": ids}


def rows_of(ids: Tensor, vocab: int, seed: int = 1) -> SparseTeacher:
    g = torch.Generator().manual_seed(seed)
    n, k = ids.shape
    full = torch.log_softmax(2 * torch.randn(n, k + 1, generator=g, dtype=torch.float64), -1)
    logp = full[:, :-1].sort(-1, descending=True).values.masked_fill(ids < 0, -math.inf)
    tail = torch.log1p(-logp.exp().sum(-1).clamp(max=1 - 1e-7))
    y = torch.randint(0, vocab, (n,), generator=g)
    return SparseTeacher(ids, logp, tail, y, -3.0 * torch.rand(n, generator=g, dtype=torch.float64))


def mixed(logp: Tensor, ids: Tensor, lse: Tensor) -> Tensor:
    """A loss that weighs every entry and the logsumexp differently."""
    weights = torch.linspace(-1, 2, ids.numel(), dtype=logp.dtype).reshape(ids.shape)
    slopes = torch.linspace(0.5, -1, lse.numel(), dtype=lse.dtype)
    return (weights * torch.where(ids >= 0, logp, 0.0).exp()).sum() + (slopes * lse).sum()


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"], inputs["bias"]]))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, and the rows that met the head."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.shapes = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor):
                self.numel = max(self.numel, made.numel())
                self.shapes.add(tuple(made.shape))
        return out
