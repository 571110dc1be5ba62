"""The student as its own teacher: the same model behind another prompt, at weights that stand still or follow it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping

import torch

from topkd.engine.local_teacher import LocalTeacher
from topkd.engine.student import Student
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import Ids
from topkd.topk.types import TopK


class SelfTeacher:
    """Scores with the student's weights as an exponential moving average of them has it (OPSD, SDPO).

    After each step ``teacher = ema * teacher + (1 - ema) * student``, in float32: 1 keeps the weights the run began
    with, 0 is the student itself (nothing is copied), between them the teacher follows at a distance of about
    1 / (1 - ema) steps.

    Args:
        student: The model that learns; copied now unless ``ema`` is 0.
        ema: Share of the teacher that stays at each step.
        lock: Held by the learner while the student's weights change.
    """

    def __init__(self, student: Student, ema: float, lock: threading.Lock) -> None:
        if not 0.0 <= ema <= 1.0:
            raise ConfigError("teacher.ema is a share", got=ema, expected="from 0 to 1")
        self.ema, self._student, self._lock = ema, student, lock
        self.model = student if ema == 0.0 else _copied(student)
        self._scorer = LocalTeacher(self.model)

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """See ``topkd.topk.protocols.TeacherScorer``."""
        return await self._scorer.score(ids, start, k)

    @torch.no_grad()
    def follow(self) -> None:
        """Take the student's last step into the average; to be called once after each step."""
        if self.ema in {0.0, 1.0}:
            return
        with self._lock:
            # Parameters, not the state dict: there a tied head stands twice.
            pairs = zip(self.model.model.parameters(), self._student.model.parameters(), strict=True)
            for own, followed in pairs:
                own.lerp_(followed.to(own.dtype), 1.0 - self.ema)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average's weights, for a checkpoint; empty where they follow from the run's other state."""
        if self.ema in {0.0, 1.0}:
            return {}
        return {name: weights.detach() for name, weights in self.model.model.named_parameters()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint's average."""
        for name, weights in self.model.model.named_parameters() if state else ():
            weights.data.copy_(state[name])


def _copied(student: Student) -> Student:
    model = copy.deepcopy(student.model).float().requires_grad_(requires_grad=False)
    return Student.wrap(model, student.device.type)  # type: ignore[arg-type]
