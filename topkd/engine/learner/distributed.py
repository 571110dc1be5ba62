"""Several processes under torchrun: rank, share of a step, and sums over all ranks.

Every rank samples and scores its own share of a step's prompts, the learner divides by the *global* number of valid
tokens, and only rank 0 writes. With one process (size 1) nothing here has an effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from topkd.topk.errors import ConfigError

T = TypeVar("T")
Strategy = Literal["ddp", "fsdp2"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process, one of ``size``. Methods that communicate are collective: all ranks call them in the same order."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, *, timeout_s: float = 1800.0) -> Ranks:
        """Join torchrun's process group (gloo, and nccl for tensors on a GPU); without torchrun, one process."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or "RANK" not in os.environ:
            return cls()
        if torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    "more processes than GPUs on this machine",
                    got=f"local rank {local}",
                    expected=f"{torch.cuda.device_count()} GPUs",
                    hint="lower torchrun's --nproc-per-node",
                )
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the only one that writes files."""
        return self.rank == 0

    def slice(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's contiguous share of ``items``."""
        count = len(items)
        return items[self.rank * count // self.size : (self.rank + 1) * count // self.size]

    def most(self, value: int) -> int:
        """Return the largest value over all ranks."""
        return max(self.gather(int(value)))

    def gather(self, value: T) -> list[T]:
        """Gather every rank's value (anything that pickles), in rank order, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def first(self, value: T) -> T:
        """Broadcast rank 0's value to every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def sum_gradients(self, parameters: Iterable[Tensor], bucket_bytes: int = 64 << 20) -> None:
        """Replace every gradient by its sum over ranks, in flat buckets; a rank without one contributes zeros."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        held = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (held > bucket_bytes or parameter.grad.dtype != bucket[0].dtype):
                _sum_flat(bucket)
                bucket, held = [], 0
            bucket.append(parameter.grad)
            held += parameter.grad.numel() * parameter.grad.element_size()
        if bucket:
            _sum_flat(bucket)

    def close(self) -> None:
        """Leave the process group; torch warns if one is still open at exit."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def is_rank_lost(error: BaseException) -> bool:
    """Tell whether an error means that another process has died; gloo has no error class for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _sum_flat(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
