"""Mask and sum token losses: one boolean mask, division by the number of valid tokens.

Every loss selects the valid positions *before* its arithmetic (nan * 0 is nan, in the value and in the gradient). It
works in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from topkd.topk.errors import ConfigError
from topkd.topk.maths.scalars import check_real

IGNORE_INDEX = -100
Reduction: TypeAlias = Literal["mean", "sum"]
FullReduction: TypeAlias = Literal["batchmean", "mean", "sum", "none"]


def upcast(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged in float64; refuse integers."""
    if not x.is_floating_point():
        raise ConfigError("a loss needs floating-point tensors", got=x.dtype)
    return x if x.dtype == torch.float64 else x.float()


def to_widest(x: Tensor) -> Tensor:
    """Return x in float64 (float32 on Apple GPUs), for quantities that lose digits, such as 1 - sum_k s_k."""
    return x.float() if x.device.type == "mps" else x.double()


def check_tensors(**tensors: Tensor) -> None:
    """Raise ConfigError, with the argument's name, if an argument is not a tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{name}: not a tensor", got=type(tensor).__name__)


def check_logits(**logits: Tensor) -> None:
    """Raise ConfigError if an argument is not [..., V] with at least one id."""
    check_tensors(**logits)
    for name, tensor in logits.items():
        if tensor.dim() < 1 or tensor.shape[-1] < 1:
            raise ConfigError(f"{name}: not logits over a vocabulary", got=tuple(tensor.shape), expected="[..., V]")


def check_same(name: str, shape: torch.Size, **others: Tensor) -> None:
    """Raise ConfigError if a tensor differs in shape from ``name``."""
    check_tensors(**others)
    for other, tensor in others.items():
        if tensor.shape != shape:
            raise ConfigError(f"{other} and {name} differ in shape", got=tuple(tensor.shape), expected=tuple(shape))


def check_finite(mask: Tensor, **values: Tensor) -> None:
    """Raise ConfigError if a value is NaN or infinite at a valid position."""
    for name, value in values.items():
        bad = ~torch.isfinite(value) & mask
        if bool(bad.any()):
            index = tuple(bad.nonzero()[0].tolist())
            raise ConfigError(
                f"{name} is not finite at a valid position",
                where=f"index {index}, {int(bad.sum())} in all",
                got=float(value[index]),
                hint="mask the positions whose logprob is unknown",
            )


def select_known(name: str, values: Tensor, used: Tensor) -> Tensor:
    """Select the values of the rows that train, detached; refuse another shape, and values that are not finite."""
    check_same("the mask", used.shape, **{name: values})
    check_finite(used, **{name: values})
    return values.detach()[used]


def select_behavior(behavior_logp: Tensor | None, used: Tensor) -> Tensor | None:
    """Select the behaviour logprobs of the rows that train; None stays None."""
    return None if behavior_logp is None else select_known("behavior_logp", behavior_logp, used)


def boolean_mask(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """Return a bool mask of the shape; None means that every position is valid.

    An integer or float mask is refused: a 0/1 mask read as -100 labels, or the reverse, would give no error.
    """
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    check_tensors(mask=mask)
    if mask.dtype != torch.bool:
        raise ConfigError("a mask must be boolean", got=mask.dtype, expected="torch.bool", hint="pass mask.bool()")
    if mask.shape != shape:
        raise ConfigError("the mask and the tokens differ in shape", got=tuple(mask.shape), expected=tuple(shape))
    return mask.to(device)


def labels_mask(labels: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """Return a bool mask, True where the label is not -100; a boolean tensor is the mask itself.

    Integers that are all 0 or 1 are refused: they are almost always a mask, and as labels would keep every position.
    """
    if labels is not None:
        check_tensors(labels=labels)
    if labels is None or labels.dtype == torch.bool:
        return boolean_mask(labels, shape, device)
    if labels.shape != shape:
        raise ConfigError("labels and tokens differ in shape", got=tuple(labels.shape), expected=tuple(shape))
    if labels.is_floating_point() or labels.is_complex():
        raise ConfigError("labels must be integers (-100 = ignored) or a boolean mask", got=labels.dtype)
    if labels.numel():
        if bool(((labels == 0) | (labels == 1)).all()):
            raise ConfigError(
                "labels hold only 0 and 1, like a mask; as labels (-100 = ignored) they would keep every position",
                hint="pass a boolean mask",
            )
        if bool(((labels < 0) & (labels != IGNORE_INDEX)).any()):
            raise ConfigError("a label is negative but not -100", got=int(labels.min()), expected="-100 or a token id")
    return (labels != IGNORE_INDEX).to(device)


def reduce_mean(values: Tensor, count: int, num_tokens: float | Tensor | None) -> Tensor:
    """Compute sum(values) / num_tokens (default: the ``count`` valid tokens); a differentiable 0.0 for no tokens.

    Args:
        values: Contributions of the valid tokens only.
        count: Number of valid tokens here.
        num_tokens: Valid tokens of the global batch when gradients are accumulated over micro-batches or ranks.
    """
    if num_tokens is None:
        return values.sum() / max(count, 1)
    if not 0 < check_real("num_tokens", num_tokens) < math.inf:
        raise ConfigError("num_tokens must be positive", got=float(num_tokens))
    return values.sum() / num_tokens


def reduce_tokens(
    values: Tensor, mask: Tensor, reduction: FullReduction, num_tokens: float | Tensor | None = None
) -> Tensor:
    """Reduce the valid tokens' values: mean and batchmean per valid token, sum, or none (0 at masked positions)."""
    if reduction in ("mean", "batchmean"):
        return reduce_mean(values, values.shape[0], num_tokens)
    if num_tokens is not None:
        raise ConfigError("num_tokens has no meaning for this reduction", got=reduction, expected="mean or batchmean")
    if reduction == "sum":
        return values.sum()
    if reduction == "none":
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
    raise ConfigError("unknown reduction", got=reduction, expected="batchmean, mean, sum or none")
