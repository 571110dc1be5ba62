"""The prompts of a run as token ids, before any model is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.chat_templates import Side
from topkd.compose.data.prompts import Readers, read_prompts
from topkd.compose.progress import Progress
from topkd.engine.loop.prompts import PromptRow
from topkd.topk.errors import DataError


@dataclass(frozen=True, slots=True)
class Prompts:
    """The data of a run as ids.

    Attributes:
        tokenizer: The student's, which is the teachers' too.
        readers: How each side reads.
        rows: In the file's order.
        dropped: Names of the over-long rows that were left out.
    """

    tokenizer: Any
    readers: Readers
    rows: list[PromptRow]
    dropped: list[str] = field(default_factory=list)


def load_prompts(config: RunConfig, progress: Progress) -> Prompts:
    """Tokenizer and rows: all that can be known of a run before a model is opened."""
    from topkd.engine.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.student.model)
    readers = build_readers(config, tokenizer)
    rows, dropped = read_prompts(
        Path(config.data.path),
        readers,
        max_tokens=config.rollout.max_prompt_tokens,
        overlong=config.rollout.overlong,
        limit=config.data.limit,
    )
    if dropped:
        progress.note(f"{len(dropped)} prompts longer than {config.rollout.max_prompt_tokens} tokens were dropped")
    _check_privileged_columns(config, rows)
    return Prompts(tokenizer, readers, rows, dropped)


def _check_privileged_columns(config: RunConfig, rows: list[PromptRow]) -> None:
    """Raises where the config has templates for what only the teacher sees, and no row has any of it to tell."""
    data = config.data
    named = data.privileged.given()
    if not named or (data.feedback is not None and "feedback" in named):  # told once a completion is there
        return
    if not any(row.columns.get(name) is not None for row in rows for name in named):
        there = {str(name) for row in rows for name in row.columns}
        there |= {"prompt_ids" for row in rows if not row.columns.keys() & {"prompt", "messages"}}
        raise DataError(
            f"no row has a column {' or '.join(map(repr, named))} for its template in [data.privileged]",
            where=data.path, got=f"columns {', '.join(sorted(there))}",
            hint="without one the teacher is told no more than the student: name the column so, or leave the table out",
        )  # fmt: skip


def build_readers(config: RunConfig, tokenizer: Any) -> Readers:
    """Student's and teachers' sides; what a teacher leaves out it shares with the student."""
    student = Side.of(tokenizer, config.student.chat_template, config.student.chat_template_kwargs)
    teachers = {}
    for name, teacher in config.teacher_map().items():
        own = teacher.chat_template_kwargs
        kwargs = config.student.chat_template_kwargs if own is None else own
        teachers[name] = Side.of(tokenizer, teacher.chat_template or config.student.chat_template, kwargs)
    return Readers(student, teachers or None, config.data.privileged, config.data.teacher_column, config.data.turns)
