"""Teachers without a server: a model folder opened in this process, or the student itself behind another prompt."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import TeacherConfig
from topkd.compose.data.digests import digest_weights
from topkd.topk.protocols import TeacherScorer

if TYPE_CHECKING:
    from topkd.engine.models.local_teacher import SelfTeacher


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A teacher in this process.

    Attributes:
        scorer: It.
        name: For the cache and the provenance.
        revision: Of its weights: the config's, else their hash.
        model: The ``Student`` that scores, where exact divergences can be taken against it.
        state: The teacher itself, when it follows the student: it is told of each step, and checkpoints keep it.
    """

    scorer: TeacherScorer
    name: str
    revision: str
    model: Any
    state: SelfTeacher | None = None

    def fingerprint(self) -> dict[str, Any]:
        """For the run log."""
        return {"model": self.name, "revision": self.revision, "kind": "in this process"}


def open_local(teacher: TeacherConfig, config: RunConfig, student: Any, lock: threading.Lock) -> LocalModel:
    """A ``local`` or ``self`` teacher, ready to score; call it before the student's weights change.

    Args:
        teacher: Its table.
        config: Of the run.
        student: The loaded student.
        lock: Held by the learner while weights change.
    """
    if teacher.kind == "self":
        from topkd.engine.models.local_teacher import SelfTeacher

        own = SelfTeacher(student, teacher.ema, lock)
        revision = teacher.revision or (digest_weights(student) if teacher.ema == 1.0 else "moving")
        state = None if teacher.ema in {0.0, 1.0} else own
        return LocalModel(own, f"{Path(config.student.model).name} (self)", revision, own.model, state)
    from topkd.engine.models.local_teacher import LocalTeacher
    from topkd.engine.models.student import Student

    folder = str(teacher.model)
    model = Student.load(folder, config.student.device, config.student.dtype)
    return LocalModel(LocalTeacher(model), Path(folder).name, teacher.revision or digest_weights(model), model)
