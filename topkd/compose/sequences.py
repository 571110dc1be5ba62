"""Data files to sequences that a teacher scores: JSONL, Parquet, datasets folders and caches, one row at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pydantic import ValidationError

from topkd.compose.conversations import recorded
from topkd.compose.mistakes import in_words
from topkd.compose.portions import UNIT, Portion
from topkd.compose.prompts import DataRow, teacher_tokens, valid_ids
from topkd.compose.rendering import Side
from topkd.offline import ScoreStore
from topkd.offline.folder import FORMAT_FILE
from topkd.offline.parquet_files import open_parquet, read_batches
from topkd.offline.records import ROLLOUT
from topkd.topk.errors import ConfigError, DataError
from topkd.topk.samples import FinishReason
from topkd.topk.types import Float32, Int32

_FORMS = "prompt_ids and completion_ids, prompt and completion, or messages"
_BATCH = 64  # rows read at a time
_JSON_NAMES = {str: "a string", list: "a list", int: "a number", float: "a number", bool: "a truth value",
               type(None): "null"}  # fmt: skip


class ScoredRow(DataRow):
    """A row whose completion is there already; ``logp`` are the logprobs it was sampled with, when they are known."""

    completion_ids: list[int] | None = None
    completion: str | None = None
    logp: list[float] | None = None
    finish_reason: FinishReason = "stop"


@dataclass(frozen=True, slots=True)
class ScoreInput:
    """One sequence: rows ``start ..`` are what a score of it holds.

    Attributes:
        number: Line of a JSONL file (from 1), row of any other source (from 0).
        ids: int32, the prompt as the teacher sees it and the completion.
        start: P - 1.
        sample_id: The row's own name.
        teacher_id: Which teacher it is for.
        logp: float32 [C], what the completion was sampled with, or None.
        finish_reason: How the completion ended, as the row says.
        prompt_ids: With ``logp``: the prompt that the completion was sampled from, without what only the teacher sees.
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


def read_sequences(path: Path, tokenizer: Any = None, portion: Portion | None = None) -> Iterator[Item]:
    """Every row in order, lazily; a bad one comes as a ``BadRow`` in its place.

    Args:
        path: A JSONL or Parquet file, a folder of ``datasets.Dataset.save_to_disk``, or a cache (its rollouts).
        tokenizer: For rows of text; None when all rows hold ids.
        portion: Only these rows (of ``units``).
    """
    if path.is_dir() and (path / FORMAT_FILE).exists():
        yield from (
            _rollouts(path) if portion is None else islice(_rollouts(path), portion.first, portion.first + portion.rows)
        )
        return
    for number, raw in raw_rows(path, portion):
        try:
            yield _sequence(number, raw, tokenizer, f"{path}:{number}")
        except DataError as error:
            yield BadRow(number, error)


def check_source(path: Path) -> None:
    """Raises DataError for what is not there, for no rows, and for a cache where no rollouts wait to be scored."""
    if not (path.is_dir() and (path / FORMAT_FILE).exists()):
        check_rows(path)
    elif next(_rollouts(path), None) is None:
        raise DataError(
            "the cache holds no rollouts to score", where=str(path), expected="what a run with [cache] recorded",
            hint="a data file goes in its place",
        )  # fmt: skip


def check_rows(path: Path) -> None:
    """Raises DataError for data that is not there, and for data without a row: a job of nothing is a mistake."""
    if not path.exists():
        raise DataError("no such file or folder", where=str(path))
    if not (path.is_file() or path.is_dir()):
        raise DataError("neither a file nor a folder", where=str(path), hint="a pipe is read once: save its rows first")
    if next(raw_rows(path), None) is None:
        raise DataError("the data holds no row", where=str(path), hint="was whatever wrote it cut short?")


def count_rows(path: Path) -> int:
    """How many rows there are, for a forecast; 0 when that is not known beforehand."""
    if path.is_dir():
        return 0 if (path / FORMAT_FILE).exists() else len(_dataset(path))
    if path.suffix == ".parquet":
        return int(open_parquet(path).metadata.num_rows)
    try:
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise DataError("cannot read the data file", where=str(path), got=error.strerror) from error


def units(path: Path) -> Iterator[Portion]:
    """Where the rows of a source may be divided."""
    if path.is_dir() and (path / FORMAT_FILE).exists():
        rows = sum(1 for _ in _rollouts(path))
    elif path.is_dir() or path.suffix == ".parquet":
        rows = count_rows(path)
    else:
        yield from _line_units(path)
        return
    yield from (Portion(first, min(UNIT, rows - first)) for first in range(0, rows, UNIT))


def raw_rows(path: Path, portion: Portion | None = None) -> Iterator[tuple[int, Any]]:
    """Rows as they stand: bytes of a JSONL line with its number from 1, else mappings with theirs from 0."""
    first, last = (0, None) if portion is None else (portion.first, portion.first + portion.rows)
    if path.is_dir():
        data = _dataset(path)
        yield from enumerate(data if last is None else data.select(range(first, last)), first)
    elif path.suffix == ".parquet":
        rows = ((number, row) for start, batch in _batches(path, first, last)
                for number, row in enumerate(batch.to_pylist(), start) if number >= first)  # fmt: skip
        yield from rows if last is None else islice(rows, last - first)
    else:
        yield from islice(_lines(path, portion), None if portion is None else portion.rows)


def _lines(path: Path, portion: Portion | None) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            if portion is not None:
                file.seek(portion.offset)
            first = 1 if portion is None else portion.line
            yield from ((number, line) for number, line in enumerate(file, start=first) if line.strip())
    except OSError as error:
        raise DataError("cannot read the data file", where=str(path), got=error.strerror) from error


def _line_units(path: Path) -> Iterator[Portion]:
    rows = offset = 0
    begun: Portion | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    if begun is None:
                        begun = Portion(rows, 0, number, offset)
                    rows += 1
                    if rows - begun.first == UNIT:
                        yield replace(begun, rows=UNIT)
                        begun = None
                offset += len(line)
    except OSError as error:
        raise DataError("cannot read the data file", where=str(path), got=error.strerror) from error
    if begun is not None:
        yield replace(begun, rows=rows - begun.first)


def _batches(path: Path, first: int, last: int | None) -> Iterator[tuple[int, Any]]:
    """Batches of the row groups that hold rows first to last, each with the number of its first row."""
    file, start = open_parquet(path), 0
    groups = []
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if start + rows > first and (last is None or start < last):
            groups.append((group, start))
        start += rows
    for group, begin in groups:
        at = begin
        for batch in read_batches(file, path, batch_size=_BATCH, row_groups=[group]):
            if at + batch.num_rows > first:
                yield at, batch
            at += batch.num_rows
            if last is not None and at >= last:
                break


def _dataset(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("a dataset folder needs datasets", hint='pip install "topkd[data]"') from error
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            "neither a saved dataset nor a cache", where=str(path), got=str(error).splitlines()[0]
        ) from error
    if isinstance(found, datasets.DatasetDict):
        raise DataError(
            "the folder holds several splits", where=str(path), got=sorted(found), hint="give one split's folder"
        )
    return found


def _rollouts(path: Path) -> Iterator[Item]:
    numbers = count()
    with ScoreStore(path) as store:
        for record in store.records(kinds=(ROLLOUT,)):
            for rollout in record.rollouts():
                number, ids = next(numbers), np.concatenate([rollout.prompt_ids, rollout.completion_ids])
                if rollout.completion_ids.size == 0:
                    yield BadRow(number, DataError("an empty completion", where=f"{path}:{number}"))
                else:
                    yield ScoreInput(number, ids, rollout.prompt_ids.size - 1, f"rollout {number}", "")


def _sequence(number: int, raw: Any, tokenizer: Any, where: str) -> ScoreInput:
    row = _parsed(raw, where)
    told = row.privileged and row.teacher_prompt_ids is None
    if tokenizer is None and (row.prompt_ids is None or told):
        what = "rows of text" if row.prompt_ids is None else f"rows with a {next(iter(row.privileged))}"
        raise ConfigError(f"{what} need a tokenizer", where=where, hint="give --tokenizer PATH")
    if row.prompt_ids is not None:
        prompt, completion = teacher_tokens(row, tokenizer, where), row.completion_ids or []
    elif row.completion is not None:
        prompt = teacher_tokens(row, tokenizer, where)
        completion = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
    else:
        prompt, completion = _last_answer(row, tokenizer, where)
    if not completion or min(completion) < 0:
        raise DataError(
            "a completion needs at least one token and no negative id", where=where, got=list(completion[:8])
        )
    name = str(row.id) if row.id is not None else f"row {number}"
    if max(*prompt, *completion) > np.iinfo(np.int32).max:
        raise DataError("token id out of range", where=where, got=max(*prompt, *completion))
    if row.logp is not None and row.prompt_ids is None:
        raise DataError(
            "logp needs prompt_ids and completion_ids: text does not say which tokens it is of", where=where
        )
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
    asked = None if logp is None else np.array(valid_ids(row.prompt_ids or [], "a prompt", where), np.int32)
    return ScoreInput(number, ids, len(prompt) - 1, name, row.teacher_id, logp, row.finish_reason, asked)


def json_object(raw: Any, where: str) -> dict[str, Any]:
    """A row as a mapping; what is no JSON is refused with the column where it stops being some."""
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except json.JSONDecodeError as error:
            at, what = f"{where}, column {min(error.pos, len(error.doc.rstrip())) + 1}", error.msg
            got = repr(error.doc[error.pos :].strip()[:40]) if error.doc[error.pos :].strip() else "the end of the line"
            if what.startswith("Expecting "):
                raise DataError("not a JSON object", where=at, got=got, expected=what[10:]) from error
            raise DataError(f"not a JSON object, {what[:1].lower()}{what[1:]}", where=at, got=got) from error
        except UnicodeDecodeError as error:
            raise DataError("not a JSON object", where=where, got="not UTF-8 text") from error
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"
            raise DataError("not a JSON object", where=where, got=reason) from error
    if not isinstance(raw, dict):
        raise DataError("not a JSON object", where=where, got=_JSON_NAMES.get(type(raw), type(raw).__name__))
    return raw


def _parsed(raw: Any, where: str) -> ScoredRow:
    raw = json_object(raw, where)
    try:
        # Tables have every column in every row: a null is an absent key.
        row = ScoredRow.model_validate({key: value for key, value in raw.items() if value is not None})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"]) or "the row"
        got = repr(problem["input"])
        raise DataError(
            f"{key} cannot be read", where=where, got=got if len(got) < 60 else got[:57] + "...",
            expected=in_words(problem),
        ) from None  # fmt: skip
    names = ("prompt_ids", "completion_ids", "prompt", "completion", "messages")
    given = [name for name in names if getattr(row, name) is not None]
    if given not in (["prompt_ids", "completion_ids"], ["prompt", "completion"], ["messages"]):
        raise DataError("not a row that can be scored", where=where, got=", ".join(given) or "none", expected=_FORMS)
    return row


def _last_answer(row: ScoredRow, tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """The conversation up to the last assistant message, and that message with the token that ends it."""
    messages = row.messages or []
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise DataError(
            "the last of at least two messages must be the assistant's", where=where,
            got=[message.get("role") for message in messages][-4:],
        )  # fmt: skip
    prompt = teacher_tokens(row.model_copy(update={"messages": messages[:-1]}), tokenizer, where)
    talk = recorded(Side(tokenizer), messages, len(messages) - 1, where)
    return prompt, [int(token) for token in talk.ids[talk.prompt_len :]]
