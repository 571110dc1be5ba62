"""Prompts of a run as token ids for the student and the teachers, read before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import PrivilegedConfig
from topkd.compose.data.chat_templates import Side
from topkd.compose.data.conversations import read_conversation
from topkd.compose.data.files import iter_raw_rows, parse_json_object
from topkd.compose.data.rows import DataRow, check_row, check_token_ids, render_prompt
from topkd.compose.progress import Progress
from topkd.engine.loop.prompts import PromptRow
from topkd.topk.errors import DataError


@dataclass(frozen=True, slots=True)
class Readers:
    """How the student and each teacher turn a row into ids.

    Attributes:
        student: The student's side.
        teachers: teacher_id -> that teacher's side; a row with another teacher_id is an error. None: every teacher_id
            is allowed, and its side is the student's.
        privileged: Templates for text that only the teacher sees.
        teacher_column: Column with the teacher_id of a row.
        turns: See ``DataConfig``.
    """

    student: Side
    teachers: Mapping[str, Side] | None = None
    privileged: PrivilegedConfig = field(default_factory=PrivilegedConfig)
    teacher_column: str = "teacher_id"
    turns: Literal["last", "all"] = "last"

    def teacher_of(self, raw: Mapping[str, Any], where: str) -> tuple[str, Side]:
        """Return the teacher_id of a row, and that teacher's side."""
        name = raw.get(self.teacher_column)
        name = "" if name is None else name
        if not isinstance(name, str):
            raise DataError(f"{self.teacher_column} cannot be read", where=where, got=repr(name), expected="a name")
        if self.teachers is None:
            return name, self.student
        if name not in self.teachers:
            known = sorted(self.teachers)
            raise DataError(
                f"no teacher named {name!r}" if name else f"the row names no teacher in {self.teacher_column!r}",
                where=where, expected="no name: there is one [teacher]" if known == [""] else f"one of {known}",
            )  # fmt: skip
        return name, self.teachers[name]


def read_prompts(
    path: Path,
    readers: Readers,
    *,
    max_tokens: int,
    overlong: Literal["drop", "error"],
    limit: int | None = None,
) -> tuple[list[PromptRow], list[str]]:
    """Read the rows as ids; also return the names of the rows that were dropped as too long.

    Args:
        path: A JSONL or Parquet file, or a folder of ``datasets.Dataset.save_to_disk``.
        readers: Both sides; chat templates are applied here, once.
        max_tokens: Longest prompt allowed, for the student and for the teacher.
        overlong: Whether to drop longer rows or to raise an error; a prompt is never cut.
        limit: Largest number of rows to keep.
    """
    rows: list[PromptRow] = []
    dropped: list[str] = []
    for number, raw in _iter_objects(path):
        if limit is not None and len(rows) >= limit:
            break
        row = _build_prompt_row(raw, number, readers, f"{path}:{number}")
        longest = max(row.prompt_ids.size, row.teacher_prompt_ids.size)
        if longest > max_tokens:
            if overlong == "error":
                raise DataError(
                    "prompt too long", where=f"{path}:{number}", got=f"{longest} tokens",
                    expected=f"at most {max_tokens}",
                    hint='raise rollout.max_prompt_tokens or set rollout.overlong = "drop"',
                )  # fmt: skip
            dropped.append(row.sample_id)
        else:
            rows.append(row)
    if not rows:
        raise DataError(
            "no usable prompt", where=str(path), got=f"{len(dropped)} over-long rows dropped" if dropped else "no rows",
            hint="raise rollout.max_prompt_tokens" if dropped else "",
        )  # fmt: skip
    return rows, dropped


def check_opens(path: Path) -> None:
    """Read the first row of a data file; raise DataError if there is none."""
    if next(_iter_objects(path), None) is None:
        raise DataError("no usable prompt", where=str(path), got="no rows")


def _iter_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.exists():
        raise DataError("cannot read the data file", where=str(path), got="no such file or folder")
    for number, raw in iter_raw_rows(path):
        yield number, parse_json_object(raw, f"{path}:{number}")


def _build_prompt_row(raw: dict[str, Any], number: int, readers: Readers, where: str) -> PromptRow:
    row = check_row(raw, where)
    teacher_id, teacher = readers.teacher_of(raw, where)
    name = str(row.id) if row.id is not None else f"line {number}"
    completion, mask = None, None
    if row.messages is not None:
        row, completion, mask = _split_answer(row, readers, where)
    elif row.completion is not None:
        completion = readers.student.text(row.completion, where, special=False)
        if readers.student.tokenizer.eos_token_id is not None:
            completion.append(int(readers.student.tokenizer.eos_token_id))
    elif row.completion_ids is not None:
        completion = row.completion_ids
    prompt = render_prompt(row, readers.student, {}, readers.privileged, where)
    if row.teacher_prompt_ids is not None:
        if row.privileged:
            raise DataError("teacher_prompt_ids excludes other text for the teacher", where=where,
                            got=sorted(row.privileged))  # fmt: skip
        teacher_prompt = check_token_ids(row.teacher_prompt_ids, "a teacher's prompt", where)
    elif row.privileged or teacher != readers.student:
        teacher_prompt = render_prompt(row, teacher, row.privileged, readers.privileged, where)
    else:
        teacher_prompt = prompt
    return PromptRow(
        np.array(prompt),
        np.array(teacher_prompt),
        teacher_id,
        name,
        None if completion is None else np.array(check_token_ids(completion, "a completion", where)),
        mask,
        {key: value for key, value in raw.items() if value is not None and not key.endswith("_ids")},
    )


def _split_answer(row: DataRow, readers: Readers, where: str) -> tuple[DataRow, list[int] | None, Any]:
    """Return the messages before the answer, the answer's ids (None if there is no answer), and their mask."""
    messages = row.messages or []
    if not messages:
        raise DataError("messages needs at least one message", where=where)
    answers = [place for place, message in enumerate(messages) if message.get("role") == "assistant"]
    closing = messages[-1].get("role") == "assistant"
    if not closing and (readers.turns == "last" or not answers):
        return row, None, None
    first = answers[0] if readers.turns == "all" else len(messages) - 1
    if first == 0:
        raise DataError("a conversation needs a message before the first answer", where=where)
    whole = messages[: answers[-1] + 1]
    conversation = read_conversation(readers.student, whole, first, where)
    ids, mask = conversation.ids[conversation.prompt_len :], conversation.mask[conversation.prompt_len :]
    return row.model_copy(update={"messages": messages[:first]}), ids.tolist(), None if mask.all() else mask


@dataclass(frozen=True, slots=True)
class Prompts:
    """The data of a run as ids.

    Attributes:
        tokenizer: The tokenizer of the student and the teachers.
        readers: How each side turns a row into ids.
        rows: The rows in the file's order.
        dropped: Names of the rows that were dropped as too long.
    """

    tokenizer: Any
    readers: Readers
    rows: list[PromptRow]
    dropped: list[str] = field(default_factory=list)


def load_prompts(config: RunConfig, progress: Progress) -> Prompts:
    """Load the tokenizer and the rows of a run; no model is needed."""
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
    """Raise DataError if the config sets templates for the teacher, and no row has a column for them."""
    data = config.data
    named = data.privileged.list_changed()
    if not named or (data.feedback is not None and "feedback" in named):  # comes after a completion
        return
    if not any(row.columns.get(name) is not None for row in rows for name in named):
        there = {str(name) for row in rows for name in row.columns}
        there |= {"prompt_ids" for row in rows if not row.columns.keys() & {"prompt", "messages"}}
        raise DataError(
            f"no row has a column {' or '.join(map(repr, named))} for its template in [data.privileged]",
            where=data.path, got=f"columns {', '.join(sorted(there))}",
            hint="without it the teacher sees no more than the student: rename the column, or remove the table",
        )  # fmt: skip


def build_readers(config: RunConfig, tokenizer: Any) -> Readers:
    """Build the student's and the teachers' sides; a teacher without settings of its own gets the student's."""
    student = Side.of(tokenizer, config.student.chat_template, config.student.chat_template_kwargs)
    teachers = {}
    for name, teacher in config.teacher_map().items():
        own = teacher.chat_template_kwargs
        kwargs = config.student.chat_template_kwargs if own is None else own
        teachers[name] = Side.of(tokenizer, teacher.chat_template or config.student.chat_template, kwargs)
    return Readers(student, teachers or None, config.data.privileged, config.data.teacher_column, config.data.turns)
