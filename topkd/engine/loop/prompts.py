"""Prompts, and their order, which depends on the seed alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topkd.topk.errors import DataError
from topkd.topk.types import Bool, Int32


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt as ids, for the student and (when the teacher sees more, or has another template) for the teacher.

    Attributes:
        prompt_ids: int32 [P], P >= 1.
        teacher_prompt_ids: int32 [P'], the same ids unless the teacher's context is privileged.
        teacher_id: Which teacher scores it.
        sample_id: The row's own name.
        completion_ids: int32 [C], C >= 1: the answer that came with the row, None when there is none.
        completion_mask: bool [C], the completion tokens that train (in a conversation, the assistant's); None: all.
        columns: The row as it is in its file, for answer scorers and feedback.
    """

    prompt_ids: Int32
    teacher_prompt_ids: Int32
    teacher_id: str = ""
    sample_id: str = ""
    completion_ids: Int32 | None = None
    completion_mask: Bool | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "teacher_prompt_ids", "completion_ids"):
            if name == "completion_ids" and self.completion_ids is None:
                continue
            array = np.asarray(getattr(self, name), dtype=np.int32)
            if array.ndim != 1 or array.size < 1:
                raise DataError(f"{name} needs at least one token", where=f"row {self.sample_id or '?'}")
            object.__setattr__(self, name, array)
        if self.completion_mask is not None:
            mask = np.asarray(self.completion_mask, dtype=np.bool_)
            if self.completion_ids is None or mask.shape != self.completion_ids.shape:
                raise DataError(
                    "completion_mask needs one value for each completion token", where=f"row {self.sample_id or '?'}",
                    got=mask.shape, expected=None if self.completion_ids is None else self.completion_ids.shape,
                )  # fmt: skip
            object.__setattr__(self, "completion_mask", mask)


def step_indices(rows: int, per_step: int, step: int, seed: int) -> list[int]:
    """List the rows of step ``step``; each epoch is shuffled separately and has every row once.

    Stateless: for step n a resumed run gets the same rows as an uninterrupted run.
    """
    positions = range(step * per_step, (step + 1) * per_step)
    return [int(_shuffle_epoch(rows, position // rows, seed)[position % rows]) for position in positions]


@lru_cache(maxsize=4)
def _shuffle_epoch(rows: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)
