"""Rows of JSONL, Parquet and dataset files, read in order."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from topkd.offline.exchange.parquet_files import open_parquet, read_batches
from topkd.offline.store.folder import FORMAT_FILE
from topkd.topk.errors import ConfigError, DataError

_BATCH = 64  # rows read at a time

_JSON_NAMES = {str: "a string", list: "a list", int: "a number", float: "a number", bool: "a truth value",
               type(None): "null"}  # fmt: skip


def check_has_rows(path: Path) -> None:
    """Raise DataError if the data is missing, or has no row."""
    if not path.exists():
        raise DataError("no such file or folder", where=str(path))
    if not (path.is_file() or path.is_dir()):
        raise DataError("neither a file nor a folder", where=str(path), hint="a pipe is read once: save its rows first")
    if next(iter_raw_rows(path), None) is None:
        raise DataError("the data holds no row", where=str(path), hint="was the program that wrote it interrupted?")


def count_rows(path: Path) -> int:
    """Count the rows, for a forecast; return 0 for a cache, where the number is not known."""
    if path.is_dir():
        return 0 if (path / FORMAT_FILE).exists() else len(_open_dataset(path))
    if path.suffix == ".parquet":
        return int(open_parquet(path).metadata.num_rows)
    with _open_lines(path) as file:
        return sum(1 for line in file if line.strip())


def iter_raw_rows(path: Path, chunk: RowChunk | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (number, row): the bytes of JSONL lines, numbered from 1, or else mappings, numbered from 0."""
    first, last = (0, None) if chunk is None else (chunk.first, chunk.first + chunk.rows)
    if path.is_dir():
        data = _open_dataset(path)
        yield from enumerate(data if last is None else data.select(range(first, last)), first)
    elif path.suffix == ".parquet":
        rows = ((number, row) for start, batch in _iter_batches(path, first, last)
                for number, row in enumerate(batch.to_pylist(), start) if number >= first)  # fmt: skip
        yield from rows if last is None else islice(rows, last - first)
    else:
        yield from islice(_iter_lines(path, chunk), None if chunk is None else chunk.rows)


@contextlib.contextmanager
def _open_lines(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError("cannot read the data file", where=str(path), got=error.strerror) from error


def _iter_lines(path: Path, chunk: RowChunk | None) -> Iterator[tuple[int, bytes]]:
    with _open_lines(path) as file:
        if chunk is not None:
            file.seek(chunk.offset)
        first = 1 if chunk is None else chunk.line
        yield from ((number, line) for number, line in enumerate(file, start=first) if line.strip())


def _iter_line_chunks(path: Path) -> Iterator[RowChunk]:
    rows = offset = 0
    begun: RowChunk | None = None
    with _open_lines(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                if begun is None:
                    begun = RowChunk(rows, 0, number, offset)
                rows += 1
                if rows - begun.first == UNIT:
                    yield replace(begun, rows=UNIT)
                    begun = None
            offset += len(line)
    if begun is not None:
        yield replace(begun, rows=rows - begun.first)


def _iter_batches(path: Path, first: int, last: int | None) -> Iterator[tuple[int, Any]]:
    """Yield batches of the row groups that hold rows first to last, each with the number of its first row."""
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


def _open_dataset(path: Path) -> Any:
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


def parse_json_object(raw: Any, where: str) -> dict[str, Any]:
    """Parse a row as a JSON object; refuse invalid JSON and name the column."""
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
            reason = "nested too deeply" if isinstance(error, RecursionError) else "a number with thousands of digits"
            raise DataError("not a JSON object", where=where, got=reason) from error
    if not isinstance(raw, dict):
        raise DataError("not a JSON object", where=where, got=_JSON_NAMES.get(type(raw), type(raw).__name__))
    return raw


UNIT = 64  # rows of a unit; a chunk consists of whole units
_MAX_UNITS = 16  # largest number of units in a chunk
_CHUNKS_EACH = 8  # smallest number of chunks per worker, so that none waits long for the last one


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Consecutive rows.

    Attributes:
        first: Number of rows before it.
        rows: Number of its rows.
        line: Number of its first line (JSONL).
        offset: Byte where that line begins (JSONL).
    """

    first: int
    rows: int
    line: int = 1
    offset: int = 0


def group_chunks(units: Iterator[RowChunk], *, workers: int, limit: int | None = None) -> list[RowChunk]:
    """Group the units of a file, cut at the limit, into chunks of a size that keeps all workers busy.

    Args:
        units: Units in the order of the file (``iter_chunks``).
        workers: Number of workers.
        limit: Largest number of rows.
    """
    within = []
    for unit in units:
        rows = unit.rows if limit is None else min(unit.rows, limit - unit.first)
        if rows <= 0:
            break
        within.append(replace(unit, rows=rows))
    size = max(1, min(_MAX_UNITS, len(within) // (_CHUNKS_EACH * workers)))
    groups = [within[at : at + size] for at in range(0, len(within), size)]
    return [replace(group[0], rows=sum(unit.rows for unit in group)) for group in groups]
