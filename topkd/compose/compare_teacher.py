"""The embedded pair's teacher, asked for a whole step at once: a pass a sequence would be a third of a cell's time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkd.engine.local_teacher import LocalTeacher
from topkd.engine.student import Student
from topkd.topk.samples import Rollout

_STEPS_KEPT = 4  # drawn, and not yet scored


class StepTeacher(LocalTeacher):
    """Scores each sequence of a step out of one pass over all of them; any other sequence by itself.

    What shares a pass is the step as it was drawn, whatever the timing: a rerun rounds alike.
    """

    def __init__(self, model: Student) -> None:
        super().__init__(model)
        self._lock = threading.Lock()
        self._steps: deque[_Step] = deque(maxlen=_STEPS_KEPT)

    def expect(self, rollouts: Sequence[Rollout]) -> None:
        """These are the sequences of a step that will be scored."""
        step = _Step([np.concatenate([one.prompt_ids, one.completion_ids]).astype(np.int64) for one in rollouts])
        with self._lock:
            self._steps.append(step)

    @torch.inference_mode()
    def _logp(self, ids: NDArray[np.int64], start: int) -> Tensor:
        key = ids.tobytes()
        with self._lock:
            step = next((step for step in self._steps if key in step.places), None)
            logits = None if step is None else step.logits(self.model)[step.places[key]]
        if logits is None or not 0 <= start < ids.size - 1:
            return super()._logp(ids, start)
        return torch.log_softmax(logits[start : ids.size - 1].double(), dim=-1)


class _Step:
    """The sequences of one step, and their logits once somebody asks."""

    def __init__(self, sequences: Sequence[NDArray[np.int64]]) -> None:
        self.sequences = sequences
        self.places = {ids.tobytes(): place for place, ids in enumerate(sequences)}
        self._logits: Tensor | None = None

    def logits(self, model: Student) -> Tensor:
        """float32 [B, T - 1, V] on the CPU."""
        if self._logits is None:
            width = max(ids.size for ids in self.sequences) - 1
            inputs = torch.zeros(len(self.sequences), width, dtype=torch.long)
            attention = torch.zeros_like(inputs)
            for row, ids in enumerate(self.sequences):
                inputs[row, : ids.size - 1] = torch.from_numpy(ids[:-1])
                attention[row, : ids.size - 1] = 1
            rows = torch.arange(inputs.numel(), device=model.device)
            flat = model.logit_rows(inputs.to(model.device), attention.to(model.device), rows)
            self._logits = flat.reshape(len(self.sequences), width, -1).cpu()
        return self._logits
