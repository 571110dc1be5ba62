"""In-place work on one chunk of logits: exponentials, float32 copies of a few rows, accurate sums in bf16."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 160 << 20  # the one chunk of logits: 256 rows of a 152k vocabulary in float32, 512 in bf16
_BLOCK = {"cpu": 1 << 19}  # float32 elements at once: on a CPU they stay in its cache from max to exp to sum
_LARGE_BLOCK = 1 << 25
# dW may be summed in half precision over this many chunks: each addition rounds by 2**-9 of the sum so far (bf16), so
# 16 of them double the error of a single rounding, while hundreds would lose what a small chunk adds to a large sum.
MOST_HALF_SUMS = 16
_SLAB = 8192  # vocabulary rows of dW that are converted to float32 at once


class WeightSum:
    """dW = sum over row chunks of dz^T h: in the weight's dtype, or in float32 where half precision would lose digits.

    The float32 sum takes another 4 bytes per weight, and is used only for more than ``MOST_HALF_SUMS`` chunks.
    """

    def __init__(self, weight: Tensor, chunks: int) -> None:
        self.dtype = weight.dtype
        self.wide = weight.dtype != accumulator(weight) and chunks > MOST_HALF_SUMS
        self.total = torch.zeros_like(weight, dtype=accumulator(weight) if self.wide else weight.dtype)

    def add(self, d_logits: Tensor, hidden: Tensor) -> None:
        """Add ``d_logits^T hidden``, [C, V] and [C, H]."""
        if not self.wide:
            self.total.addmm_(d_logits.t(), hidden)
            return
        for first in range(0, self.total.shape[0], _SLAB):
            part = slice(first, first + _SLAB)
            self.total[part] += d_logits[:, part].t() @ hidden

    def result(self) -> Tensor:
        """Return the sum in the weight's dtype."""
        return self.total.to(self.dtype)


def exponentiate(z: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into exp(z - max) in place; return logp at ids (-inf at pads), logsumexp and sum exp(z - max)."""
    target = z.gather(1, ids.clamp(min=0)).to(dtype)
    lse, mass = (torch.empty(z.shape[0], dtype=dtype, device=z.device) for _ in range(2))
    for rows, block, wide in iter_widened(z, dtype):
        top = wide.amax(-1, keepdim=True)
        torch.sum(wide.sub_(top).exp_(), -1, out=mass[rows])
        torch.add(top.squeeze(-1), mass[rows].log(), out=lse[rows])
        if wide is not block:
            block.copy_(wide)
    return (target - lse.unsqueeze(-1)).masked_fill(ids < 0, -math.inf), lse, mass


def add_at(z: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add values[i, k] to z[i, ids[i, k]] in place; scatter_add_ on a CPU would copy z in half precision."""
    flat = ids + torch.arange(z.shape[0], device=z.device).unsqueeze(-1) * z.shape[1]
    z.view(-1).index_add_(0, flat.reshape(-1), values.reshape(-1).to(z.dtype))


def iter_widened(z: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield row blocks of z, each also in the wide dtype: the block itself, or a copy in one small workspace.

    A new copy for each block would fragment the heap, by 300 MB in the end.
    """
    size = max(1, _BLOCK.get(z.device.type, _LARGE_BLOCK) // z.shape[1])
    space = None if z.dtype == dtype else torch.empty((min(size, z.shape[0]), z.shape[1]), dtype=dtype, device=z.device)
    for start in range(0, z.shape[0], size):
        rows = slice(start, min(start + size, z.shape[0]))
        block = z[rows]
        yield rows, block, block if space is None else space[: rows.stop - start].copy_(block)


def even(total: int, most: int) -> int:
    """Compute the size of equal chunks of at most ``most`` (at least 16), so that the last one is not nearly empty."""
    chunks = math.ceil(max(total, 1) / max(most, 16))
    return math.ceil(max(total, 1) / chunks)


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype to sum in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
