"""A teacher in this process: the same protocol as a server, for self-distillation, tests and exact references."""

from __future__ import annotations

import asyncio

import numpy as np
import torch

from topkd.engine.student import Student
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import Ids
from topkd.topk.types import TopK, tail_logp


class LocalTeacher:
    """Scores with a local model: float32 logits, exact realised-token logprobs, tail mass from float64."""

    def __init__(self, model: Student) -> None:
        self.model = model

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """See ``topkd.topk.protocols.TeacherScorer``."""
        return await asyncio.to_thread(self._score, np.asarray(ids, dtype=np.int64), start, k)

    @torch.inference_mode()
    def _score(self, ids: np.ndarray[tuple[int], np.dtype[np.int64]], start: int, k: int) -> TopK:
        if not 0 <= start < ids.size - 1:
            raise ConfigError("nothing to score", got=f"start {start} of {ids.size} tokens", expected="start < len - 1")
        device = self.model.device
        inputs = torch.from_numpy(ids[None, :-1]).to(device)
        rows = torch.arange(start, ids.size - 1, device=device)
        logits = self.model.logit_rows(inputs, torch.ones_like(inputs), rows)
        logp = torch.log_softmax(logits.double(), dim=-1).cpu()
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
