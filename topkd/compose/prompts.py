"""Data files to prompts: JSONL rows with ``prompt_ids``, ``prompt`` or ``messages``; a bad row is named by its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from topkd.engine.data import PromptRow
from topkd.topk.errors import ConfigError, DataError


class DataRow(BaseModel):
    """One line of the file; keys that topkd does not use (a reference answer, a source) may stand beside these."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    prompt_ids: list[int] | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    id: str | int | None = None
    teacher_id: str = ""
    hint: str | None = None


def read_prompts(
    path: Path, tokenizer: Any, *, max_tokens: int, overlong: Literal["drop", "error"], limit: int | None = None
) -> tuple[list[PromptRow], int]:
    """Rows of a JSONL file as ids, and how many over-long ones were dropped.

    Args:
        path: The file.
        tokenizer: The student's (chat templates are applied once, here); it may be None when all rows hold ids.
        max_tokens: Longest prompt allowed, for the student and the teacher alike.
        overlong: Drop longer rows (counted) or refuse the file; a prompt is never cut.
        limit: Read this many rows at most.
    """
    rows: list[PromptRow] = []
    dropped = 0
    for number, line in _lines(path):
        if limit is not None and len(rows) >= limit:
            break
        where = f"{path}:{number}"
        row = _parse(line, where)
        prompt = prompt_tokens(row, tokenizer, None, where)
        teacher = prompt if row.hint is None else prompt_tokens(row, tokenizer, row.hint, where)
        longest = max(len(prompt), len(teacher))
        if longest > max_tokens:
            if overlong == "error":
                raise DataError(
                    "prompt too long", where=where, got=f"{longest} tokens", expected=f"at most {max_tokens}",
                    hint='raise rollout.max_prompt_tokens or set rollout.overlong = "drop"',
                )  # fmt: skip
            dropped += 1
            continue
        name = str(row.id) if row.id is not None else f"line {number}"
        rows.append(PromptRow(np.array(prompt), np.array(teacher), row.teacher_id, name))
    if not rows:
        raise DataError("no usable prompt", where=str(path), got=f"{dropped} over-long rows dropped")
    return rows, dropped


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError("cannot read the data file", where=str(path), got=reason) from error


def _parse(line: str, where: str) -> DataRow:
    try:
        row = DataRow.model_validate(json.loads(line))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"]) or "the row"
        raise DataError(f"{key} cannot be read", where=where, expected=problem["msg"]) from None
    except ValueError as error:
        raise DataError("not a JSON object", where=where, got=line.strip()[:60]) from error
    given = [name for name in ("prompt_ids", "prompt", "messages") if getattr(row, name) is not None]
    if len(given) != 1:
        raise DataError(
            "a row needs exactly one of prompt_ids, prompt, messages", where=where, got=given or "none of them"
        )
    return row


def prompt_tokens(row: DataRow, tokenizer: Any, hint: str | None, where: str) -> list[int]:
    """The prompt as ids; with a hint, as the teacher sees it: before the text, or as a system message."""
    if row.prompt_ids is not None:
        if hint is not None:
            raise DataError("a hint needs a text prompt or messages, not prompt_ids", where=where)
        ids = row.prompt_ids
    elif tokenizer is None:
        raise ConfigError("text prompts need the student's tokenizer", where=where)
    elif row.prompt is not None:
        ids = tokenizer(row.prompt if hint is None else f"{hint}\n{row.prompt}")["input_ids"]
    else:
        messages = [{"role": "system", "content": hint}, *row.messages] if hint else row.messages  # type: ignore[misc]
        if tokenizer.chat_template is None:
            raise DataError("messages need a chat template, the student's tokenizer has none", where=where)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if not ids or min(ids) < 0:
        raise DataError("a prompt needs at least one token and no negative id", where=where, got=ids[:8])
    if max(ids) > np.iinfo(np.int32).max:
        raise DataError("a token id is out of range", where=where, got=max(ids), expected="below 2**31")
    return [int(token) for token in ids]
