"""Prompts in, in an order that depends on the seed alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from topkd.topk.errors import DataError
from topkd.topk.types import Int32


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt as ids, for the student and (when it sees more, or another template) for the teacher.

    Attributes:
        prompt_ids: int32 [P], P >= 1.
        teacher_prompt_ids: int32 [P'], the same ids unless the teacher's context is privileged.
        teacher_id: Which teacher scores it.
        sample_id: The row's own name.
    """

    prompt_ids: Int32
    teacher_prompt_ids: Int32
    teacher_id: str = ""
    sample_id: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "teacher_prompt_ids"):
            array = np.asarray(getattr(self, name), dtype=np.int32)
            if array.ndim != 1 or array.size < 1:
                raise DataError(f"{name} needs at least one token", where=f"row {self.sample_id or '?'}")
            object.__setattr__(self, name, array)


def step_indices(rows: int, per_step: int, step: int, seed: int) -> list[int]:
    """Which rows step ``step`` takes: epochs shuffled one by one, no row twice before every row once.

    Stateless: a resumed run asks for step n and gets what the uninterrupted run got.
    """
    positions = range(step * per_step, (step + 1) * per_step)
    return [int(_epoch(rows, position // rows, seed)[position % rows]) for position in positions]


@lru_cache(maxsize=4)
def _epoch(rows: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)
