"""What a run's config names on this machine, loaded and checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topkd.compose.config import RunConfig
from topkd.compose.progress import Progress
from topkd.compose.prompts import read_prompts
from topkd.engine.data import PromptRow
from topkd.topk.errors import DataError


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a config names on this machine, loaded."""

    tokenizer: Any
    student: Any
    rows: list[PromptRow]


def load_pieces(config: RunConfig, progress: Progress) -> Pieces:
    """Tokenizer, student and prompts of a config."""
    from topkd.engine.student import Student, load_tokenizer

    tokenizer = load_tokenizer(config.student.model)
    student = Student.load(config.student.model, config.student.device, config.student.dtype)
    rows, dropped = read_prompts(
        Path(config.data.path),
        tokenizer,
        max_tokens=config.rollout.max_prompt_tokens,
        overlong=config.rollout.overlong,
        limit=config.data.limit,
    )
    for row in rows:
        if (top := int(row.prompt_ids.max())) >= student.vocab_size:
            raise DataError(
                "a prompt holds an id that the student does not have", where=f"{config.data.path}, {row.sample_id}",
                got=top, expected=f"below {student.vocab_size}", hint="was the file made with another tokenizer?",
            )  # fmt: skip
    if dropped:
        progress.note(f"{dropped} prompts longer than {config.rollout.max_prompt_tokens} tokens were dropped")
    return Pieces(tokenizer, student, rows)
