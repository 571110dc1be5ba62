"""Student logprobs at a few ids, and losses on them, from (hidden, lm_head) without N x V logits.

Three routes, all exact up to rounding, all with gradients for hidden, weight and bias:

* ``topk_logprobs``: logprobs and logsumexp for any later loss; vocabulary chunks, recomputed in the backward pass.
* ``fused_row_loss``: the loss is known now and adds up over rows; row chunks, gradients taken in the forward pass.
* ``subset_logits``: only the logits at the ids, for losses renormalised on them; the head is never multiplied out.

Shapes: N rows, H hidden, V vocabulary, K ids a row (-1 = pad). Nothing depends on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from topkd.topk.errors import ConfigError
from topkd.topk.scalars import positive

RowLoss: TypeAlias = Callable[[Tensor, Tensor, slice], Tensor]
"""(logp [C, K], lse [C], rows) -> loss of each row [C]; may be differentiated with respect to logp only."""

F = TypeVar("F", bound=Callable[..., Any])
_CHUNK_BYTES = 160 << 20  # the one chunk of logits: 256 rows of a 152k vocabulary in float32, 512 in bf16
_BLOCK = {"cpu": 1 << 19}  # elements in float32 at once: on a CPU they stay in the cache between max, exp and sum
_LARGE_BLOCK = 1 << 25


def eager(function: F) -> F:
    """The function left out of ``torch.compile``: it fills buffers in place; a compiled model breaks cleanly at it."""
    return cast("F", torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def gather_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logprobs at given ids and the logsumexp, from logits [..., V] and ids [..., K]: ([..., K], [...]).

    log s(v) = z_v - logsumexp(z), natural log, float32 (float64 stays); -inf without a gradient at pads (-1).
    """
    _check_ids(ids, logits.shape[:-1], logits.shape[-1])
    if not logits.is_floating_point():
        raise ConfigError("logits must be floating-point", got=logits.dtype)
    z = logits if logits.dtype == torch.float64 else logits.float()
    lse = torch.logsumexp(z, -1)
    logp = z.gather(-1, ids.clamp(min=0)) - lse.unsqueeze(-1)
    return logp.masked_fill(ids < 0, -math.inf), lse


@eager
def topk_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Student logprobs at given ids and the logsumexp, from the last hidden states and the head.

    log s(v) = z_v - logsumexp(z), z = hidden weight^T + bias, natural log. The vocabulary is walked in chunks with a
    running logsumexp; the backward pass computes each chunk again, so that dW is written once and no more than
    N x chunk logits exist. Use it for any loss; ``fused_row_loss`` is cheaper where it applies.

    Args:
        hidden: [N, H], rows that count only (select by the mask before the call).
        weight: [V, H]; may be frozen (no dW is made) or tied to the embedding.
        ids: int [N, K], -1 = pad.
        bias: [V] or None.
        chunk: Vocabulary columns at a time; chosen by size when None.

    Returns:
        ``(logp, lse)``: [N, K] (-inf at pads, without a gradient) and [N], float32 (float64 stays).
    """
    hidden, weight, bias = _matched(hidden, weight, bias)
    _check_ids(ids, hidden.shape[:-1], weight.shape[0])
    most = _CHUNK_BYTES // (hidden.element_size() * max(hidden.shape[0], 1))
    columns = _even(weight.shape[0], most) if chunk is None else positive("chunk", chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        logp, lse = _TopKLogprobs.apply(hidden, weight, bias, ids, columns)  # type: ignore[no-untyped-call]
    return logp.masked_fill(ids < 0, -math.inf), lse


@eager
def fused_row_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    row_loss: RowLoss,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum over rows of ``row_loss``, with all gradients taken in the forward pass, one row chunk at a time.

    Only one [chunk, V] buffer exists: logits, then exponentials, then dL/dz = sum_k c_k (1[v = id_k] - s_v) in place,
    with c_k = dL/dlog s_k from autograd on the [chunk, K] logprobs. The head is multiplied once forward and twice
    backward, as in the plain computation.

    Args:
        hidden: [N, H], rows that count only.
        weight: [V, H]; may be frozen or tied.
        ids: int [N, K], -1 = pad.
        row_loss: Called once a chunk with logp [C, K] (-inf at pads), lse [C] (no gradient flows through it beyond
            logp's own) and the chunk's rows; returns [C].
        bias: [V] or None.
        chunk: Rows at a time; about 160 MB of logits when None.

    Returns:
        A scalar; its backward pass only scales what the forward pass made, and can run once.
    """
    hidden, weight, bias = _matched(hidden, weight, bias)
    _check_ids(ids, hidden.shape[:-1], weight.shape[0])
    most = _CHUNK_BYTES // (hidden.element_size() * weight.shape[0])
    rows = _even(hidden.shape[0], most) if chunk is None else positive("chunk", chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        grad = torch.is_grad_enabled()
        total: Tensor = _RowLoss.apply(hidden, weight, bias, ids, row_loss, rows, grad)  # type: ignore[no-untyped-call]
    return total


@eager
def subset_logits(hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Logits at the ids only, [N, K] float32 (float64 stays), -inf at pads; cost N K H instead of N V H.

    Enough for every loss that is renormalised on the ids: the normaliser over the vocabulary cancels.
    """
    hidden, weight, bias = _matched(hidden, weight, bias)
    _check_ids(ids, hidden.shape[:-1], weight.shape[0])
    rows = max(1, _CHUNK_BYTES // (2 * weight.element_size() * max(ids.shape[-1] * weight.shape[1], 1)))
    z = _SubsetLogits.apply(hidden, weight, ids.clamp(min=0), rows)  # type: ignore[no-untyped-call]
    if bias is not None:
        z = z + bias.to(z.dtype)[ids.clamp(min=0)]
    return torch.as_tensor(z.masked_fill(ids < 0, -math.inf))


class _RowLoss(torch.autograd.Function):
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
        wants = [grad and needed for needed in ctx.needs_input_grad[:3]]
        n, vocab = hidden.shape[0], weight.shape[0]
        dtype = _accumulator(hidden)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight) if wants[1] else None
        d_bias = torch.zeros(vocab, dtype=dtype, device=hidden.device) if wants[2] else None
        buffer = torch.empty((min(rows, n), vocab), dtype=hidden.dtype, device=hidden.device)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            h, z, chosen = hidden[part], buffer[: part.stop - start], ids[part]
            torch.mm(h, weight.t(), out=z)
            if bias is not None:
                z.add_(bias)
            logp, lse, mass = _exponentiate(z, chosen, dtype)
            with torch.enable_grad():
                leaf = logp.requires_grad_(any(wants))
                chunk_total = row_loss(leaf, lse, part).sum()
            total += chunk_total.detach()
            if not any(wants):
                continue
            (coefficient,) = torch.autograd.grad(chunk_total, leaf, materialize_grads=True)
            coefficient = torch.where(chosen >= 0, coefficient, 0.0)
            scale = (-coefficient.sum(-1) / mass).unsqueeze(-1)
            for inside, block, wide in _widened(z, dtype):
                block.copy_(wide.mul_(scale[inside]))
            _add_at(z, chosen.clamp(min=0), coefficient)
            if d_hidden is not None:
                torch.mm(z, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight.addmm_(z.t(), h)
            if d_bias is not None:
                for _, _, wide in _widened(z, dtype):
                    d_bias += wide.sum(0)
        ctx.grads = [d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            what = "the fused loss went backward twice; its gradients are made once, in the forward pass"
            raise ConfigError(what, hint="add the losses up before backward(), or compute the loss again")
        grads, ctx.grads = ctx.grads, None
        scaled = [None if made is None else made.mul_(d_total.to(made.dtype)) for made in grads]
        return (*scaled, None, None, None, None)


class _TopKLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, columns: int) -> Any:  # noqa: PLR0917
        n, vocab, dtype = hidden.shape[0], weight.shape[0], _accumulator(hidden)
        target = torch.zeros(ids.shape, dtype=dtype, device=hidden.device)
        lse = torch.full((n,), -math.inf, dtype=dtype, device=hidden.device)
        for first in range(0, vocab, columns):
            z = _columns(hidden, weight, bias, first, columns)
            local = ids - first
            inside = (local >= 0) & (local < z.shape[1])
            target += torch.where(inside, z.gather(1, local.clamp(0, z.shape[1] - 1)).to(dtype), 0.0)
            for rows, block, wide in _widened(z, dtype):  # noqa: B007 - deleted below, as it is z's storage
                lse[rows] = torch.logaddexp(lse[rows], wide.logsumexp(-1))
            del z, block, wide  # before the next chunk is made
        ctx.save_for_backward(hidden, weight, bias, ids, lse)
        ctx.columns = columns
        return target - lse.unsqueeze(-1), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        coefficient = torch.where(ids >= 0, d_logp, 0.0)
        slope = d_lse - coefficient.sum(-1)
        dtype = _accumulator(hidden)
        d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for first in range(0, weight.shape[0], ctx.columns):
            z = _columns(hidden, weight, bias, first, ctx.columns)
            part = slice(first, first + z.shape[1])
            for rows, block, wide in _widened(z, dtype):
                block.copy_(wide.sub_(lse[rows].unsqueeze(-1)).exp_().mul_(slope[rows].unsqueeze(-1)))
            local = ids - first
            inside = (local >= 0) & (local < z.shape[1])
            _add_at(z, local.clamp(0, z.shape[1] - 1), torch.where(inside, coefficient, 0.0))
            if d_hidden is not None:
                d_hidden += z @ weight[part]
            if d_weight is not None:
                torch.mm(z.t(), hidden, out=d_weight[part])
            if d_bias is not None:
                d_bias[part] = torch.stack([wide.sum(0) for _, _, wide in _widened(z, dtype)]).sum(0)
            del z, block, wide  # before the next chunk is made
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, None, None


class _SubsetLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, rows: int) -> Tensor:
        z = torch.empty(ids.shape, dtype=_accumulator(hidden), device=hidden.device)
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
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            slope = d_z[part].to(hidden.dtype).unsqueeze(1)
            if d_hidden is not None:
                d_hidden[part] = torch.bmm(slope, weight[ids[part]]).squeeze(1)
            if d_weight is not None:
                outer = slope.transpose(1, 2) * hidden[part].unsqueeze(1)
                d_weight.index_add_(0, ids[part].reshape(-1), outer.reshape(-1, hidden.shape[1]))
        return d_hidden, d_weight, None, None


def _exponentiate(z: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into exp(z - max) in place; returns logp at ids (-inf at pads), logsumexp and sum exp(z - max)."""
    target = z.gather(1, ids.clamp(min=0)).to(dtype)
    lse, mass = (torch.empty(z.shape[0], dtype=dtype, device=z.device) for _ in range(2))
    for rows, block, wide in _widened(z, dtype):
        top = wide.amax(-1, keepdim=True)
        torch.sum(wide.sub_(top).exp_(), -1, out=mass[rows])
        torch.add(top.squeeze(-1), mass[rows].log(), out=lse[rows])
        if wide is not block:
            block.copy_(wide)
    return (target - lse.unsqueeze(-1)).masked_fill(ids < 0, -math.inf), lse, mass


def _add_at(z: Tensor, ids: Tensor, values: Tensor) -> None:
    """z[i, ids[i, k]] += values[i, k] in place; scatter_add_ on a CPU would make a copy of z in half precision."""
    flat = ids + torch.arange(z.shape[0], device=z.device).unsqueeze(-1) * z.shape[1]
    z.view(-1).index_add_(0, flat.reshape(-1), values.reshape(-1).to(z.dtype))


def _columns(hidden: Tensor, weight: Tensor, bias: Tensor | None, first: int, columns: int) -> Tensor:
    z = hidden @ weight[first : first + columns].t()
    return z if bias is None else z.add_(bias[first : first + columns])


def _widened(z: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row blocks of z and the same in the wide dtype: the block itself, or a copy in one small workspace.

    A fresh copy a block would leave a hole in the heap each time, which small results then occupy: 300 MB in the end.
    """
    size = max(1, _BLOCK.get(z.device.type, _LARGE_BLOCK) // z.shape[1])
    space = None if z.dtype == dtype else torch.empty((min(size, z.shape[0]), z.shape[1]), dtype=dtype, device=z.device)
    for start in range(0, z.shape[0], size):
        rows = slice(start, min(start + size, z.shape[0]))
        block = z[rows]
        yield rows, block, block if space is None else space[: rows.stop - start].copy_(block)


def _even(total: int, most: int) -> int:
    """The size of equal chunks of at most ``most`` (at least 16): the last one is not left nearly empty."""
    chunks = math.ceil(max(total, 1) / max(most, 16))
    return math.ceil(max(total, 1) / chunks)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _matched(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ConfigError(
            "the head does not fit the hidden states",
            got=f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}",
            expected="hidden [N, H] and weight [V, H]",
            hint="flatten and select the rows first",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError("the bias does not fit the head", got=tuple(bias.shape), expected=tuple(weight.shape[:1]))
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ConfigError("hidden states and head differ in dtype", got=hidden.dtype, expected=weight.dtype)
    return hidden, weight, None if bias is None else bias.to(hidden.dtype)


def _check_ids(ids: Tensor, rows: torch.Size, vocab: int) -> None:
    if ids.dtype != torch.long or ids.shape[:-1] != rows or ids.dim() == 0:
        raise ConfigError(
            "ids must be int64, K for each row", got=f"{ids.dtype} {tuple(ids.shape)}", expected=(*rows, "K")
        )
    if not torch.compiler.is_compiling() and ids.numel() and bool((ids.max() >= vocab) | (ids.min() < -1)):
        raise ConfigError(
            "an id lies outside the student's vocabulary",
            got=f"{int(ids.min())}..{int(ids.max())}",
            expected=f"-1..{vocab - 1}",
            hint="drop the teacher's padding ids and move their mass to the tail",
        )
