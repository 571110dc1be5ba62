"""Reads sequences for a teacher to score: from JSONL, Parquet, datasets folders and caches, one row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from topkd.compose.data.chat_templates import Side
from topkd.compose.data.conversations import read_conversation
from topkd.compose.data.files import (
    UNIT,
    RowChunk,
    _iter_line_chunks,
    check_has_rows,
    count_rows,
    iter_raw_rows,
    parse_json_object,
)
from topkd.compose.data.rows import DataRow, check_token_ids, parse_row, tokenize_prompt
from topkd.offline import ScoreStore
from topkd.offline.store.folder import FORMAT_FILE
from topkd.offline.store.records import ROLLOUT
from topkd.topk.errors import ConfigError, DataError
from topkd.topk.samples import FinishReason
from topkd.topk.types import Float32, Int32

_FORMS = "prompt_ids and completion_ids, prompt and completion, or messages"


class ScoredRow(DataRow):
    """A row with a completion; ``logp`` has the logprobs with which it was sampled, if they are known."""

    logp: list[float] | None = None
    finish_reason: FinishReason = "stop"


@dataclass(frozen=True, slots=True)
class ScoreInput:
    """One sequence; its score begins at position ``start``.

    Attributes:
        number: Line of a JSONL file (from 1), or row of any other source (from 0).
        ids: int32, the prompt as the teacher sees it, then the completion.
        start: P - 1.
        sample_id: Name of the row.
        teacher_id: Id of its teacher.
        logp: float32 [C], the logprobs with which the completion was sampled, or None.
        finish_reason: How the completion ended, from the row.
        prompt_ids: With ``logp``: the prompt from which the completion was sampled, without text for the teacher only.
    """

    number: int
    ids: Int32
    start: int
    sample_id: str
    teacher_id: str
    logp: Float32 | None = None
    finish_reason: FinishReason = "stop"
    prompt_ids: Int32 | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be scored, and why."""

    number: int
    reason: DataError


Item: TypeAlias = ScoreInput | BadRow


def read_sequences(path: Path, tokenizer: Any = None, chunk: RowChunk | None = None) -> Iterator[Item]:
    """Read every row in order, lazily; yield a ``BadRow`` for a bad one.

    Args:
        path: A JSONL or Parquet file, a folder of ``datasets.Dataset.save_to_disk``, or a cache (its rollouts).
        tokenizer: Tokenizer for rows of text; None if all rows hold ids.
        chunk: Read only these rows (from ``iter_chunks``).
    """
    if path.is_dir() and (path / FORMAT_FILE).exists():
        yield from (
            _iter_rollouts(path)
            if chunk is None
            else islice(_iter_rollouts(path), chunk.first, chunk.first + chunk.rows)
        )
        return
    for number, raw in iter_raw_rows(path, chunk):
        try:
            yield _build_sequence(number, raw, tokenizer, f"{path}:{number}")
        except DataError as error:
            yield BadRow(number, error)


def check_source(path: Path) -> None:
    """Raise DataError for a source that is missing, has no rows, or is a cache without rollouts to score."""
    if not (path.is_dir() and (path / FORMAT_FILE).exists()):
        check_has_rows(path)
    elif next(_iter_rollouts(path), None) is None:
        raise DataError(
            "the cache holds no rollouts to score", where=str(path), expected="a cache that a run has recorded",
            hint="or give a data file",
        )  # fmt: skip


def iter_chunks(path: Path) -> Iterator[RowChunk]:
    """Yield the smallest chunks that the rows of a source can be divided into."""
    if path.is_dir() and (path / FORMAT_FILE).exists():
        rows = sum(1 for _ in _iter_rollouts(path))
    elif path.is_dir() or path.suffix == ".parquet":
        rows = count_rows(path)
    else:
        yield from _iter_line_chunks(path)
        return
    yield from (RowChunk(first, min(UNIT, rows - first)) for first in range(0, rows, UNIT))


def _iter_rollouts(path: Path) -> Iterator[Item]:
    numbers = count()
    with ScoreStore(path) as store:
        for record in store.records(kinds=(ROLLOUT,)):
            for rollout in record.rollouts():
                number, ids = next(numbers), np.concatenate([rollout.prompt_ids, rollout.completion_ids])
                if rollout.completion_ids.size == 0:
                    yield BadRow(number, DataError("an empty completion", where=f"{path}:{number}"))
                else:
                    yield ScoreInput(number, ids, rollout.prompt_ids.size - 1, f"rollout {number}", "")


def _build_sequence(number: int, raw: Any, tokenizer: Any, where: str) -> ScoreInput:
    row = _parse_row(raw, where)
    is_privileged = row.privileged and row.teacher_prompt_ids is None
    if tokenizer is None and (row.prompt_ids is None or is_privileged):
        what = "rows of text" if row.prompt_ids is None else f"rows with a {next(iter(row.privileged))}"
        raise ConfigError(f"{what} need a tokenizer", where=where, hint="give --tokenizer PATH")
    if row.prompt_ids is not None:
        prompt, completion = _tokenize_for_teacher(row, tokenizer, where), row.completion_ids or []
    elif row.completion is not None:
        prompt = _tokenize_for_teacher(row, tokenizer, where)
        completion = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
    else:
        prompt, completion = _find_last_answer(row, tokenizer, where)
    completion = check_token_ids(completion, "a completion", where)
    name = str(row.id) if row.id is not None else f"row {number}"
    if row.logp is not None and row.prompt_ids is None:
        raise DataError("logp needs prompt_ids and completion_ids, because it has a number for each token", where=where)
    logp = None if row.logp is None else np.asarray(row.logp, np.float32)
    if logp is not None and (logp.size != len(completion) or (logp > 0).any()):
        raise DataError(
            "logp must be one log-probability for each completion token", where=where, got=f"{logp.size} numbers",
            expected=f"{len(completion)}, none above 0",
        )  # fmt: skip
    if logp is not None and (logp <= -9999.0).any():
        raise DataError(
            "a sampled token cannot have had probability zero", where=where, got=float(logp.min()),
            hint="give NaN where a logprob is unknown",
        )  # fmt: skip
    ids = np.array([*prompt, *completion], np.int32)
    asked = None if logp is None else np.array(check_token_ids(row.prompt_ids or [], "a prompt", where), np.int32)
    return ScoreInput(number, ids, len(prompt) - 1, name, row.teacher_id, logp, row.finish_reason, asked)


def _parse_row(raw: Any, where: str) -> ScoredRow:
    row = parse_row(ScoredRow, parse_json_object(raw, where), where)
    names = ("prompt_ids", "completion_ids", "prompt", "completion", "messages")
    names_set = [name for name in names if getattr(row, name) is not None]
    if names_set not in (["prompt_ids", "completion_ids"], ["prompt", "completion"], ["messages"]):
        raise DataError(
            "not a row that can be scored", where=where, got=", ".join(names_set) or "none", expected=_FORMS
        )
    return row


def _find_last_answer(row: ScoredRow, tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """Split off the last assistant message, with the token that ends it."""
    messages = row.messages or []
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise DataError(
            "a row needs two or more messages, and the last one must be the assistant's", where=where,
            got=[message.get("role") for message in messages][-4:],
        )  # fmt: skip
    prompt = _tokenize_for_teacher(row.model_copy(update={"messages": messages[:-1]}), tokenizer, where)
    talk = read_conversation(Side(tokenizer), messages, len(messages) - 1, where)
    return prompt, [int(token) for token in talk.ids[talk.prompt_len :]]


def _tokenize_for_teacher(row: ScoredRow, tokenizer: Any, where: str) -> list[int]:
    if row.teacher_prompt_ids is not None:
        return check_token_ids(row.teacher_prompt_ids, "a teacher's prompt", where)
    return tokenize_prompt(row, tokenizer, row.privileged, where)
