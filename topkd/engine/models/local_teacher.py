"""A teacher in this process: the same protocol as a server, for self-distillation, tests and exact references."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkd.engine.models.student import Student
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import Ids
from topkd.topk.types import Float32, Int32, TopK, tail_logp


class LocalTeacher:
    """Scores with a local model: float32 logits, exact realised-token logprobs, tail mass from float64."""

    def __init__(self, model: Student) -> None:
        self.model = model

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """See ``topkd.topk.protocols.TeacherScorer``."""
        if k < 0:
            raise ConfigError("k must be at least 0", got=k)
        return await asyncio.to_thread(self._score, self.model.known(ids), start, k)

    async def score_candidates(self, ids: Ids, start: int, candidates: Int32) -> Float32:
        """See ``topkd.topk.protocols.CandidateScorer``."""

        def look_up() -> Float32:
            wanted = torch.from_numpy(self.model.known(np.maximum(candidates, 0)))
            logp = self._logp(self.model.known(ids), start)
            found = logp.gather(1, wanted).numpy().astype(np.float32)
            return np.where(candidates >= 0, found, np.float32(-np.inf))

        return await asyncio.to_thread(look_up)

    @torch.inference_mode()
    def _logp(self, ids: NDArray[np.int64], start: int) -> Tensor:
        """Compute logprobs of the tokens after ``start``, float64 [R, V] on the CPU."""
        if not 0 <= start < ids.size - 1:
            raise ConfigError("nothing to score", got=f"start {start} of {ids.size} tokens", expected="start < len - 1")
        device = self.model.device
        inputs = torch.from_numpy(ids[None, :-1]).to(device)
        rows = torch.arange(start, ids.size - 1, device=device)
        logits = self.model.logit_rows(inputs, torch.ones_like(inputs), rows)
        return torch.log_softmax(logits.double(), dim=-1).cpu()

    def _score(self, ids: NDArray[np.int64], start: int, k: int) -> TopK:
        logp = self._logp(ids, start)
        values, top = logp.topk(min(k, logp.shape[1]), dim=1)
        actual = ids[start + 1 :]
        realised = logp[torch.arange(len(actual)), torch.from_numpy(actual)]
        return TopK(
            start,
            top.numpy().astype(np.int32),
            values.numpy().astype(np.float32),
            actual.astype(np.int32),
            realised.numpy().astype(np.float32),
            tail_logp(values.numpy()),
        )


class SelfTeacher:
    """Scores with an exponential moving average of the student's weights (OPSD, SDPO).

    After each step ``teacher = ema * teacher + (1 - ema) * student``, in float32. With 1 the weights stay those of the
    start of the run, with 0 the teacher is the student itself (nothing is copied); between them the teacher lags about
    1 / (1 - ema) steps behind.

    Args:
        student: The model that learns; copied now unless ``ema`` is 0.
        ema: Weight of the old average at each step.
        lock: Held by the learner while the student's weights change.
    """

    def __init__(self, student: Student, ema: float, lock: threading.Lock) -> None:
        if not 0.0 <= ema <= 1.0:
            raise ConfigError("teacher.ema must lie in [0, 1]", got=ema)
        self.ema, self._student, self._lock = ema, student, lock
        self.model = student if ema == 0.0 else _copy_weights(student)
        self._scorer = LocalTeacher(self.model)

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """See ``topkd.topk.protocols.TeacherScorer``."""
        return await self._scorer.score(ids, start, k)

    @torch.no_grad()
    def follow(self) -> None:
        """Update the average with the student's new weights; call it once after each step."""
        if self.ema in {0.0, 1.0}:
            return
        with self._lock:
            # Parameters, not the state dict, which has a tied head twice.
            pairs = zip(self.model.model.parameters(), self._student.model.parameters(), strict=True)
            for own, followed in pairs:
                own.lerp_(followed.to(own.dtype), 1.0 - self.ema)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the average's weights; nothing where the rest of the checkpoint determines them."""
        if self.ema in {0.0, 1.0}:
            return {}
        return {name: weights.detach() for name, weights in self.model.model.named_parameters()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the average from a checkpoint."""
        for name, weights in self.model.model.named_parameters() if state else ():
            weights.data.copy_(state[name])


def _copy_weights(student: Student) -> Student:
    model = copy.deepcopy(student.model).float().requires_grad_(requires_grad=False)
    return Student.wrap(model, student.device.type)  # type: ignore[arg-type]
