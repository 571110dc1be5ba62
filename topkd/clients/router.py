"""Several teachers as one: each sample goes to the teacher that its ``teacher_id`` names."""

from __future__ import annotations

from collections.abc import Mapping

from topkd.topk.errors import ConfigError
from topkd.topk.protocols import Ids, TeacherScorer
from topkd.topk.types import TopK


class TeacherRouter:
    """Teachers by ``teacher_id``. An id that nobody is mapped to is an error, never a default teacher."""

    def __init__(self, teachers: Mapping[str, TeacherScorer]) -> None:
        self._teachers = dict(teachers)

    def route(self, teacher_id: str) -> TeacherScorer:
        """The teacher of that id."""
        try:
            return self._teachers[teacher_id]
        except KeyError:
            raise ConfigError(
                "no teacher is mapped to this teacher_id",
                got=repr(teacher_id),
                expected=" or ".join(map(repr, sorted(self._teachers))) or "an entry in the mapping",
            ) from None

    async def score(self, teacher_id: str, ids: Ids, start: int, k: int) -> TopK:
        """Scores with the teacher of that id."""
        return await self.route(teacher_id).score(ids, start, k)
