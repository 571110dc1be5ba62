"""What a run's config names on this machine, loaded and checked against each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.run_prompts import Prompts, load_prompts
from topkd.compose.preflight.lengths import check_token_ids_fit
from topkd.compose.progress import Progress
from topkd.engine.loop.prompts import PromptRow


@dataclass(frozen=True, slots=True)
class LoadedStudent:
    """What a config names on this machine, loaded."""

    tokenizer: Any
    student: Any
    rows: list[PromptRow]
    dropped: list[str] = field(default_factory=list)


def load_student(config: RunConfig, progress: Progress, prompts: Prompts | None = None) -> LoadedStudent:
    """Student and prompts of a config; ``prompts`` when they are read already."""
    from topkd.engine.models.student import Student

    prompts = prompts or load_prompts(config, progress)
    model = config.student
    student = Student.load(model.model, model.device, model.dtype, lora=model.lora, seed=config.seed)
    check_token_ids_fit(config, prompts.rows, student.vocab_size)
    return LoadedStudent(prompts.tokenizer, student, prompts.rows, prompts.dropped)
