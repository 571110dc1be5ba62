"""Logprobs and logits at a few ids from the head, and row losses on them, without N x V logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from topkd.topk.errors import ConfigError
from topkd.topk.fused.blocks import CHUNK_BYTES, even
from topkd.topk.fused.functions import RowLoss, SubsetLogits, SummedRowLoss, TopKLogprobs
from topkd.topk.maths.scalars import check_positive

F = TypeVar("F", bound=Callable[..., Any])


def disable_compile(function: F) -> F:
    """Exclude a function that fills buffers in place from ``torch.compile``, which gets a graph break there."""
    return cast("F", torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def gather_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute logprobs [..., K] at chosen ids, and the logsumexp [...], from logits [..., V] and ids [..., K].

    log s(v) = z_v - logsumexp(z), natural log, exact, float32 (float64 stays); -inf without a gradient at pads (-1).
    """
    check_head_ids(ids, logits.shape[:-1], logits.shape[-1])
    if not logits.is_floating_point():
        raise ConfigError("logits must be floating-point", got=logits.dtype)
    z = logits if logits.dtype == torch.float64 else logits.float()
    lse = torch.logsumexp(z, -1)
    logp = z.gather(-1, ids.clamp(min=0)) - lse.unsqueeze(-1)
    return logp.masked_fill(ids < 0, -math.inf), lse


@disable_compile
def topk_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute logprobs at chosen ids, and the logsumexp, from the last hidden states and the head.

    log s(v) = z_v - logsumexp(z), z = hidden weight^T + bias, natural log, exact up to rounding. The vocabulary is
    processed in chunks with a running logsumexp; the backward pass computes each chunk again, so that dW is written
    once and at most N x chunk logits exist. It serves any loss; ``fused_row_loss`` is cheaper where it applies.

    Args:
        hidden: [N, H], only rows that count (select them by the mask before the call).
        weight: [V, H]; may be frozen (then no dW is computed) or tied to the embedding.
        ids: int [N, K], -1 = pad.
        bias: [V] or None.
        chunk: Vocabulary columns at a time; chosen by size when None.

    Returns:
        ``(logp, lse)``: [N, K] (-inf at pads, without a gradient) and [N], float32 (float64 stays).
    """
    hidden, weight, bias = match_head_dtype(hidden, weight, bias)
    check_head_ids(ids, hidden.shape[:-1], weight.shape[0])
    most = CHUNK_BYTES // (hidden.element_size() * max(hidden.shape[0], 1))
    columns = even(weight.shape[0], most) if chunk is None else check_positive("chunk", chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        logp, lse = TopKLogprobs.apply(hidden, weight, bias, ids, columns)  # type: ignore[no-untyped-call]
    return logp.masked_fill(ids < 0, -math.inf), lse


@disable_compile
def fused_row_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    row_loss: RowLoss,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum ``row_loss`` over rows, and compute all gradients in the forward pass, one row chunk at a time.

    Only one [chunk, V] buffer exists: logits, then exponentials, then dL/dz = sum_k c_k (1[v = id_k] - s_v) in place,
    with c_k = dL/dlog s_k from autograd on the [chunk, K] logprobs. The head is multiplied once forward and twice
    backward, as in the plain computation. Natural logs; exact up to rounding. If hidden and weight are in half
    precision, sums are in float32; the sum for dW only beyond 16 chunks (it then takes 4 more bytes per weight).

    Args:
        hidden: [N, H], only rows that count.
        weight: [V, H]; may be frozen or tied.
        ids: int [N, K], -1 = pad.
        row_loss: Called once per chunk with logp [C, K] (-inf at pads), lse [C] (no gradient flows through it beyond
            logp's own) and the chunk's rows; returns [C].
        bias: [V] or None.
        chunk: Rows at a time; about 160 MB of logits when None.

    Returns:
        A scalar; its backward pass only scales the gradients from the forward pass, and can run once.
    """
    hidden, weight, bias = match_head_dtype(hidden, weight, bias)
    check_head_ids(ids, hidden.shape[:-1], weight.shape[0])
    most = CHUNK_BYTES // (hidden.element_size() * weight.shape[0])
    rows = even(hidden.shape[0], most) if chunk is None else check_positive("chunk", chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        grad = torch.is_grad_enabled()
        total: Tensor = SummedRowLoss.apply(hidden, weight, bias, ids, row_loss, rows, grad)  # type: ignore[no-untyped-call]
    return total


@disable_compile
def subset_logits(hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Compute logits at the ids only, [N, K] float32 (float64 stays), -inf at pads; costs N K H operations, not N V H.

    z_k = hidden . weight[id_k] + bias, exact up to rounding; dW of half-precision weights is summed in float32. It is
    enough for every loss that is renormalised on the ids, where the sum over the vocabulary cancels.
    """
    hidden, weight, bias = match_head_dtype(hidden, weight, bias)
    check_head_ids(ids, hidden.shape[:-1], weight.shape[0])
    rows = max(1, CHUNK_BYTES // (2 * weight.element_size() * max(ids.shape[-1] * weight.shape[1], 1)))
    z = SubsetLogits.apply(hidden, weight, ids.clamp(min=0), rows)  # type: ignore[no-untyped-call]
    if bias is not None:
        z = z + bias.to(z.dtype)[ids.clamp(min=0)]
    return torch.as_tensor(z.masked_fill(ids < 0, -math.inf))


def match_head_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Convert hidden states, weight and bias to one dtype (that of autocast if on); refuse shapes that do not fit."""
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


def check_head_ids(ids: Tensor, rows: torch.Size, vocab: int) -> None:
    """Raise ConfigError unless the ids are int64 [*rows, K] inside the vocabulary, -1 at pads."""
    if ids.dtype != torch.long or ids.shape[:-1] != rows or ids.dim() == 0:
        raise ConfigError(
            "ids must be int64, with K ids for each row", got=f"{ids.dtype} {tuple(ids.shape)}", expected=(*rows, "K")
        )
    if not torch.compiler.is_compiling() and ids.numel() and bool((ids.max() >= vocab) | (ids.min() < -1)):
        raise ConfigError(
            "an id lies outside the student's vocabulary",
            got=f"{int(ids.min())}..{int(ids.max())}",
            expected=f"-1..{vocab - 1}",
            hint="drop the padding ids of the teacher's vocabulary and move their mass to the tail",
        )
