"""The autograd functions behind ``topk_logprobs``, ``fused_row_loss`` and ``subset_logits``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from topkd.topk.errors import ConfigError
from topkd.topk.fused.blocks import CHUNK_BYTES, WeightSum, accumulator, add_at, exponentiate, iter_widened

RowLoss: TypeAlias = Callable[[Tensor, Tensor, slice], Tensor]
"""(logp [C, K], lse [C], rows) -> loss of each row [C]; may be differentiated with respect to logp only."""


class SummedRowLoss(torch.autograd.Function):
    """Sum of a row loss; gradients of hidden, weight and bias are computed in the forward pass."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        row_loss: RowLoss,
        rows: int,
        grad: bool,  # noqa: FBT001
    ) -> Tensor:
        """Compute the sum of the row loss and all gradients, ``rows`` rows at a time."""
        wants = [grad and needed for needed in ctx.needs_input_grad[:3]]
        n, vocab = hidden.shape[0], weight.shape[0]
        dtype = accumulator(hidden)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = WeightSum(weight, math.ceil(n / rows)) if wants[1] else None
        d_bias = torch.zeros(vocab, dtype=dtype, device=hidden.device) if wants[2] else None
        buffer = torch.empty((min(rows, n), vocab), dtype=hidden.dtype, device=hidden.device)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            h, z, chosen = hidden[part], buffer[: part.stop - start], ids[part]
            torch.mm(h, weight.t(), out=z)
            if bias is not None:
                z.add_(bias)
            logp, lse, mass = exponentiate(z, chosen, dtype)
            with torch.enable_grad():
                leaf = logp.requires_grad_(any(wants))
                chunk_total = row_loss(leaf, lse, part).sum()
            total += chunk_total.detach()
            if not any(wants):
                continue
            (coefficient,) = torch.autograd.grad(chunk_total, leaf, materialize_grads=True)
            coefficient = torch.where(chosen >= 0, coefficient, 0.0)
            scale = (-coefficient.sum(-1) / mass).unsqueeze(-1)
            for inside, block, wide in iter_widened(z, dtype):
                block.copy_(wide.mul_(scale[inside]))
            add_at(z, chosen.clamp(min=0), coefficient)
            if d_hidden is not None:
                torch.mm(z, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight.add(z, h)
            if d_bias is not None:
                for _, _, wide in iter_widened(z, dtype):
                    d_bias += wide.sum(0)
        ctx.grads = [
            d_hidden,
            None if d_weight is None else d_weight.result(),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        ]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass computed."""
        if ctx.grads is None:
            what = "the fused loss ran backward twice; its gradients exist only once, from the forward pass"
            raise ConfigError(what, hint="add the losses before one backward(), or compute the loss again")
        grads, ctx.grads = ctx.grads, None
        scaled = [None if made is None else made.mul_(d_total.to(made.dtype)) for made in grads]
        return (*scaled, None, None, None, None)


class TopKLogprobs(torch.autograd.Function):
    """Logprobs at ids and the logsumexp, in chunks of the vocabulary that the backward pass computes again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, columns: int) -> Any:  # noqa: PLR0917
        """Compute logprobs at the ids and the logsumexp, ``columns`` ids of the vocabulary at a time."""
        n, vocab, dtype = hidden.shape[0], weight.shape[0], accumulator(hidden)
        target = torch.zeros(ids.shape, dtype=dtype, device=hidden.device)
        lse = torch.full((n,), -math.inf, dtype=dtype, device=hidden.device)
        for first in range(0, vocab, columns):
            z = _columns(hidden, weight, bias, first, columns)
            local = ids - first
            inside = (local >= 0) & (local < z.shape[1])
            target += torch.where(inside, z.gather(1, local.clamp(0, z.shape[1] - 1)).to(dtype), 0.0)
            for rows, block, wide in iter_widened(z, dtype):  # noqa: B007 - deleted below, as it is z's storage
                lse[rows] = torch.logaddexp(lse[rows], wide.logsumexp(-1))
            del z, block, wide  # before the next chunk is allocated
        ctx.save_for_backward(hidden, weight, bias, ids, lse)
        ctx.columns = columns
        return target - lse.unsqueeze(-1), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the vocabulary chunks again; each part of dW is written once."""
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        coefficient = torch.where(ids >= 0, d_logp, 0.0)
        slope = d_lse - coefficient.sum(-1)
        dtype = accumulator(hidden)
        d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for first in range(0, weight.shape[0], ctx.columns):
            z = _columns(hidden, weight, bias, first, ctx.columns)
            part = slice(first, first + z.shape[1])
            for rows, block, wide in iter_widened(z, dtype):
                block.copy_(wide.sub_(lse[rows].unsqueeze(-1)).exp_().mul_(slope[rows].unsqueeze(-1)))
            local = ids - first
            inside = (local >= 0) & (local < z.shape[1])
            add_at(z, local.clamp(0, z.shape[1] - 1), torch.where(inside, coefficient, 0.0))
            if d_hidden is not None:
                d_hidden += z @ weight[part]
            if d_weight is not None:
                torch.mm(z.t(), hidden, out=d_weight[part])
            if d_bias is not None:
                d_bias[part] = torch.stack([wide.sum(0) for _, _, wide in iter_widened(z, dtype)]).sum(0)
            del z, block, wide  # before the next chunk is allocated
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, None, None


def _columns(hidden: Tensor, weight: Tensor, bias: Tensor | None, first: int, columns: int) -> Tensor:
    z = hidden @ weight[first : first + columns].t()
    return z if bias is None else z.add_(bias[first : first + columns])


class SubsetLogits(torch.autograd.Function):
    """Logits at a few ids of each row, ``rows`` rows at a time; no other logit is computed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
        """Multiply each hidden row with the head's rows at its ids."""
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
        """Compute the gradients of hidden states and head."""
        hidden, weight, ids = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            if d_hidden is not None:
                d_hidden[part] = torch.bmm(d_z[part].to(hidden.dtype).unsqueeze(1), weight[ids[part]]).squeeze(1)
        d_weight = _weight_gradient(d_z, hidden, weight, ids, ctx.rows) if ctx.needs_input_grad[1] else None
        return d_hidden, d_weight, None, None


def _weight_gradient(d_z: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
    """Compute dW[v], the sum of d_z h over all entries with id v, in float32 for half precision.

    A common id has thousands of entries. Only ids that occur are converted, a few columns at a time.
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
