"""What ``vllm:FOLDER`` loads, without vLLM: a teacher in this process that counts what it is asked."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np

from topkd.topk import TopK


class InProcessTeacher:
    """Every row lists ids 3, 4, 7, the realised token has a logprob that depends on it."""

    asked: ClassVar[list[list[int]]] = []  # by every one of them; a test clears it

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def score(self, ids: Any, start: int, k: int) -> TopK:
        """As ``TeacherScorer.score``."""
        self.asked.append([int(token) for token in ids])
        return lists(ids, start, k)


def lists(ids: Any, start: int, k: int = 3) -> TopK:
    """The scores that the teacher gives."""
    actual = np.asarray(ids)[start + 1 :]
    row = [(3, -0.5), (4, -1.5), (7, -2.5)][:k]
    actual_logp = [dict(row).get(token, -1.0 - token / 1000) for token in actual.tolist()]
    return TopK.from_lists([row] * len(actual), start=start, actual_ids=actual, actual_logp=actual_logp)
