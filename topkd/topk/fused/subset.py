"""Logits at a few ids from (hidden, lm_head), at the cost of those ids only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from topkd.topk.fused.blocks import CHUNK_BYTES, accumulator
from topkd.topk.fused.head import check_head_ids, disable_compile, match_head_dtype


@disable_compile
def subset_logits(hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Logits at the ids only, [N, K] float32 (float64 stays), -inf at pads; cost N K H instead of N V H.

    z_k = hidden . weight[id_k] + bias, exact up to rounding; dW of half-precision weights is summed in float32. Enough
    for every loss that is renormalised on the ids: the normaliser over the vocabulary cancels.
    """
    hidden, weight, bias = match_head_dtype(hidden, weight, bias)
    check_head_ids(ids, hidden.shape[:-1], weight.shape[0])
    rows = max(1, CHUNK_BYTES // (2 * weight.element_size() * max(ids.shape[-1] * weight.shape[1], 1)))
    z = _SubsetLogits.apply(hidden, weight, ids.clamp(min=0), rows)  # type: ignore[no-untyped-call]
    if bias is not None:
        z = z + bias.to(z.dtype)[ids.clamp(min=0)]
    return torch.as_tensor(z.masked_fill(ids < 0, -math.inf))


class _SubsetLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
        z = torch.empty(ids.shape, dtype=accumulator(hidden), device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            z[part] = torch.bmm(weight[ids[part]], hidden[part].unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(hidden, weight, ids)
        ctx.rows = rows
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_z: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            if d_hidden is not None:
                d_hidden[part] = torch.bmm(d_z[part].to(hidden.dtype).unsqueeze(1), weight[ids[part]]).squeeze(1)
        d_weight = _weight_gradient(d_z, hidden, weight, ids, ctx.rows) if ctx.needs_input_grad[1] else None
        return d_hidden, d_weight, None, None


def _weight_gradient(d_z: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
    """dW[v] = sum over the places of v of d_z h: a common id has thousands, so half precision is summed in float32.

    Only the ids that occur are widened, a few columns at a time.
    """
    d_weight, wide = torch.zeros_like(weight), accumulator(weight)
    if weight.dtype == wide:
        _add_outer(d_weight, ids, d_z, hidden, rows)
        return d_weight
    listed, place = torch.unique(ids, return_inverse=True)
    step = max(1, CHUNK_BYTES // (4 * d_z.element_size() * max(listed.shape[0], 1)))
    for first in range(0, weight.shape[1], step):
        part = hidden[:, first : first + step].to(wide)
        total = part.new_zeros((listed.shape[0], part.shape[1]))
        _add_outer(total, place, d_z, part, max(1, rows // 4))
        d_weight[listed, first : first + step] = total.to(weight.dtype)
    return d_weight


def _add_outer(total: Tensor, place: Tensor, d_z: Tensor, hidden: Tensor, rows: int) -> None:
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        outer = d_z[part].unsqueeze(-1) * hidden[part].unsqueeze(1)
        total.index_add_(0, place[part].reshape(-1), outer.reshape(-1, total.shape[1]))
