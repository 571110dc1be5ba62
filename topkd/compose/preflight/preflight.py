"""Everything that can be found out before a model is opened: what is here, then teachers, prompts, lengths, ends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.prompts import check_opens
from topkd.compose.data.run_prompts import Prompts, load_prompts
from topkd.compose.preflight.lengths import Ends, check_lengths, compare_ends
from topkd.compose.preflight.sampler import check_sampler
from topkd.compose.preflight.teachers import TeacherInfo, check_teachers
from topkd.compose.progress import Progress
from topkd.engine.models.hub import check_there

TEACHERS = "teachers.json"  # in a run's folder: what its teachers said at the start


@dataclass(frozen=True, slots=True)
class Ready:
    """A run that may begin.

    Attributes:
        prompts: Tokenizer and rows.
        met: teacher_id -> what its server said.
        ends: Where completions end.
    """

    prompts: Prompts
    met: dict[str, TeacherInfo]
    ends: Ends

    def notes(self) -> dict[str, Any]:
        """What the run log says of it at its beginning."""
        data = {
            "rows": len(self.prompts.rows),
            "dropped_overlong": len(self.prompts.dropped),
            "dropped": self.prompts.dropped[:20],
        }
        return {"data": data, "stop_token_ids": list(self.ends.stops), "warnings": list(self.ends.notes)}


async def ready(config: RunConfig, progress: Progress, kept: Path | None = None, *, resumed: bool = False) -> Ready:
    """Raises what would end the run anyway, before it has cost anything; says what is worth knowing."""
    await asyncio.to_thread(check_here, config)
    met = await check_teachers(config, progress, kept, resumed=resumed)
    if sampler := await check_sampler(config):
        progress.note(sampler)
    prompts = load_prompts(config, progress)
    check_lengths(config, prompts, met)
    ends = compare_ends(config, prompts)
    for note in ends.notes:
        progress.note(f"note: {note}")
    return Ready(prompts, met, ends)


def check_here(config: RunConfig) -> None:
    """Raises for a model or a data file that this machine lacks: a mistyped path is told before anyone is asked."""
    check_there(config.student.model)
    check_opens(Path(config.data.path))
    if config.eval is not None:
        check_opens(Path(config.eval.path))
        if config.eval.teacher is not None:
            check_there(config.eval.teacher)
