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
        """These are the rollouts of a step, whose completions will be scored."""
        step = _Step(rollouts)
        with self._lock:
            self._steps.append(step)

    @torch.inference_mode()
    def _logp(self, ids: NDArray[np.int64], start: int) -> Tensor:
        key = ids.tobytes()
        with self._lock:
            step = next((step for step in self._steps if key in step.rows), None)
            found = None if step is None else step.logp(self.model, key)
        if found is None or start != ids.size - 1 - len(found):
            return super()._logp(ids, start)
        return found


class _Step:
    """The sequences of one step, and what comes after each token of their completions, once somebody asks."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.sequences = [np.concatenate([one.prompt_ids, one.completion_ids]).astype(np.int64) for one in rollouts]
        self.firsts = [one.prompt_ids.size - 1 for one in rollouts]
        ends = np.cumsum([one.completion_ids.size for one in rollouts])
        self.rows = {
            ids.tobytes(): slice(int(end) - one.completion_ids.size, int(end))
            for ids, one, end in zip(self.sequences, rollouts, ends, strict=True)
        }
        self._logp: Tensor | None = None

    def logp(self, model: Student, key: bytes) -> Tensor:
        """float64 [R, V] on the CPU: the completion's rows of one sequence."""
        if self._logp is None:
            width = max(ids.size for ids in self.sequences) - 1
            inputs = torch.zeros(len(self.sequences), width, dtype=torch.long)
            attention = torch.zeros_like(inputs)
            rows = []
            for place, (ids, first) in enumerate(zip(self.sequences, self.firsts, strict=True)):
                inputs[place, : ids.size - 1] = torch.from_numpy(ids[:-1])
                attention[place, : ids.size - 1] = 1
                rows.append(torch.arange(place * width + first, place * width + ids.size - 1))
            device = model.device
            logits = model.logit_rows(inputs.to(device), attention.to(device), torch.cat(rows).to(device))
            self._logp = torch.log_softmax(logits.double(), dim=-1).cpu()
        return self._logp[self.rows[key]]
