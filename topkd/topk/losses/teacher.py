"""``SparseTeacher``: rows of ``TopK`` as tensors, laid out like the student's positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch import Tensor

from topkd.topk.errors import AlignmentError, ConfigError
from topkd.topk.losses.divergence import CLAMPED_LOG_MASS, log1mexp
from topkd.topk.losses.tokens import to_widest
from topkd.topk.maths.scalars import check_positive
from topkd.topk.types import TopK

_LOWEST_TAIL = math.log(-math.expm1(CLAMPED_LOG_MASS))  # both sides' tails are at least 1e-7


@dataclass(frozen=True, slots=True)
class SparseTeacher:
    """N rows of top-K teacher logprobs on a device.

    Attributes:
        ids: int64 [N, K], -1 pads.
        logp: float [N, K], natural logs, -inf at pads.
        tail_logp: float [N], log of the mass outside the list, at least log(1e-7).
        actual_ids: int64 [N], -1 unknown.
        actual_logp: float [N], NaN unknown.
    """

    ids: Tensor
    logp: Tensor
    tail_logp: Tensor
    actual_ids: Tensor
    actual_logp: Tensor

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.dtype != torch.long or self.logp.shape != self.ids.shape:
            raise ConfigError(
                "SparseTeacher: ids and logp must be [N, K], ids int64",
                got=f"ids {self.ids.dtype} {tuple(self.ids.shape)}, logp {tuple(self.logp.shape)}",
            )
        for name in ("tail_logp", "actual_ids", "actual_logp"):
            if getattr(self, name).shape != self.ids.shape[:1]:
                got = tuple(getattr(self, name).shape)
                raise ConfigError(f"SparseTeacher.{name}: wrong shape", got=got, expected=tuple(self.ids.shape[:1]))
        # A teacher never receives a gradient, even if its lists come from logits with a graph.
        for name in ("logp", "tail_logp", "actual_logp"):
            object.__setattr__(self, name, getattr(self, name).detach())

    @property
    def listed(self) -> Tensor:
        """Whether an entry holds an id, bool [N, K] (False at pads)."""
        return self.ids >= 0

    @property
    def signal(self) -> Tensor:
        """Whether at least one listed id has a finite logprob, bool [N]; the other rows are holes."""
        return torch.isfinite(self.logp).any(-1)

    def rows(self, index: Tensor | slice) -> SparseTeacher:
        """Select rows by a boolean or integer index, or a slice."""
        return SparseTeacher(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device) -> SparseTeacher:
        """Move the rows to a device."""
        return SparseTeacher(*(getattr(self, field.name).to(device) for field in fields(self)))

    def head(self, k: int | None) -> SparseTeacher:
        """Keep the k most probable entries; add the dropped mass to the tail. None changes nothing.

        Some servers append the realised token y to the k requested entries. It must be dropped: a support that contains
        y *because* y was sampled biases the estimator.
        """
        if k is None or check_positive("k", k) >= self.ids.shape[-1]:
            return self
        tail = torch.logsumexp(torch.cat([self.logp[:, k:], self.tail_logp[:, None]], -1), -1)
        return SparseTeacher(self.ids[:, :k], self.logp[:, :k], tail, self.actual_ids, self.actual_logp)

    def distinct(self) -> SparseTeacher:
        """List each id once per row: keep its most probable entry, and make the others pads."""
        order = self.logp.argsort(stable=True, dim=-1, descending=True)
        ids, at = self.ids.gather(-1, order).sort(stable=True, dim=-1)
        again = torch.zeros_like(ids, dtype=torch.bool)
        again[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
        if not torch.compiler.is_compiling() and not again.any():
            return self
        repeated = torch.zeros_like(again).scatter(-1, order.gather(-1, at), again)
        ids, logp = self.ids.masked_fill(repeated, -1), self.logp.masked_fill(repeated, -math.inf)
        return SparseTeacher(ids, logp, self.tail_logp, self.actual_ids, self.actual_logp)

    @classmethod
    def from_topk(cls, teacher: TopK, device: torch.device, dtype: torch.dtype) -> SparseTeacher:
        """Build tensors from a TopK; an unknown tail is computed from the listed logprobs."""

        def floats(values: object) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        logp, tail = floats(teacher.logp), floats(teacher.tail_logp)
        listed_mass = torch.logsumexp(to_widest(logp), -1) if teacher.k else torch.full_like(to_widest(tail), -math.inf)
        derived = log1mexp(listed_mass.clamp(max=CLAMPED_LOG_MASS)).to(dtype)
        tail = torch.where(torch.isnan(tail), derived, tail)
        return cls(
            torch.tensor(teacher.ids, dtype=torch.long, device=device),
            logp,
            tail.clamp(min=_LOWEST_TAIL),
            torch.tensor(teacher.actual_ids, dtype=torch.long, device=device),
            floats(teacher.actual_logp),
        )


Teacher: TypeAlias = TopK | Sequence[TopK] | SparseTeacher


def flatten_teacher(teacher: Teacher, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> SparseTeacher:
    """Flatten the teacher to N = prod(shape) rows.

    Args:
        teacher: One TopK of all rows, one TopK per sequence, or a SparseTeacher. For positions [B, T], B TopKs of at
            most T rows each are padded with holes at the end.
        shape: Shape of the student's positions, [N] or [B, T].
        device: The student's device.
        dtype: float32 or float64, like the student's logprobs.
    """
    if isinstance(teacher, SparseTeacher):
        sparse = teacher.to(device).distinct()
    else:
        if not isinstance(teacher, TopK):
            parts: object = teacher
            if not isinstance(parts, Sequence) or not all(isinstance(part, TopK) for part in parts):
                raise ConfigError(
                    "teacher: not a TopK, a sequence of TopK or a SparseTeacher",
                    got=type(teacher).__name__,
                    hint="build one with TopK.from_lists([[(id, logprob), ...], ...])",
                )
            teacher = TopK.concat(_pad(teacher, shape))
        sparse = SparseTeacher.from_topk(teacher, device, dtype)
    if sparse.ids.shape[0] != math.prod(shape):
        raise AlignmentError(
            "teacher and student have different numbers of rows",
            got=int(sparse.ids.shape[0]),
            expected=math.prod(shape),
            hint="row i of the teacher must be the distribution of the student's row i",
        )
    return sparse


def _pad(parts: Sequence[TopK], shape: torch.Size) -> list[TopK]:
    if len(shape) != 2:
        return list(parts)
    if len(parts) != shape[0] or any(part.rows > shape[1] for part in parts):
        # even if the total is right: a sequence that is too long would shift the next one's rows to wrong positions
        raise AlignmentError(
            "teacher: the sequences do not fit the student's positions",
            got=f"rows {[part.rows for part in parts]}",
            expected=f"{shape[0]} sequences of at most {shape[1]} rows",
            hint="pass one TopK per sequence, or one TopK of all rows",
        )
    return [piece for part in parts for piece in (part, TopK.from_lists([None] * (shape[1] - part.rows)))]
