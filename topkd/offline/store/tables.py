"""The indexes of a whole folder as one table."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from topkd.offline.store.folder import open_folder
from topkd.offline.store.index import ENTRY
from topkd.offline.store.keys import TeacherIdentity
from topkd.offline.store.records import IDENTITY, ROLLOUT, SCORE, Header
from topkd.offline.store.segments import Damage, Segment, list_segments
from topkd.topk.errors import CacheCorruptError

ROW = np.dtype([("high", "<u8"), ("segment", "<u4"), *[(name, ENTRY[name]) for name in ENTRY.names or ()]])


Table: TypeAlias = np.ndarray[Any, Any]


def read_tables(root: Path, *, first: int = 0, damage: list[Damage] | None = None) -> tuple[list[Segment], Table]:
    """Read the segments of a folder, and one row for each record.

    Args:
        root: The folder.
        first: Number of the first segment.
        damage: If given, every record is read: only undamaged ones have a row, and damage is appended to this list.
    """
    segments: list[Segment] = []
    tables = []
    for path in list_segments(root):
        with contextlib.suppress(FileNotFoundError):
            segment = Segment(path)
            position = first + len(segments)
            segments.append(segment)
            if segment.index is None or damage is not None:
                scan = segment.scan(payloads=damage is not None)
                tables.append(tabulate_headers(position, scan.found))
                if damage is not None:
                    damage += [item for item in segment.damage + scan.damage if item.fatal]
                continue
            table = np.zeros(len(segment.index.high), ROW)
            table["high"], table["segment"] = segment.index.high, position
            for name in ENTRY.names or ():
                table[name] = segment.index.entries[name]
            tables.append(table)
    return segments, concat_tables(tables)


@contextlib.contextmanager
def open_tables(root: Path, *, damage: list[Damage] | None = None) -> Iterator[tuple[list[Segment], Table]]:
    """Open the segments of a cache, with one row for each record (see ``read_tables``)."""
    open_folder(root, create=False)
    segments, table = read_tables(root, damage=damage)
    try:
        yield segments, table
    finally:
        close_segments(segments)


def concat_tables(tables: list[Table]) -> Table:
    """Concatenate tables."""
    return np.concatenate(tables) if tables else np.zeros(0, ROW)


def select_answer_rows(table: Table) -> Table:
    """Select the rows of scores and rollouts."""
    return np.asarray(table[np.isin(table["kind"], (SCORE, ROLLOUT))])


def tabulate_headers(position: int, found: list[tuple[int, Header]]) -> Table:
    """Make table rows from scanned headers."""
    table = np.zeros(len(found), ROW)
    for row, (offset, header) in enumerate(found):
        high, low = int.from_bytes(header.key[:8], "big"), int.from_bytes(header.key[8:], "big")
        table[row] = (
            high, position, low, offset, header.start, header.rows, header.width, header.asked, header.tag,
            header.kind, header.codec, 0,
        )  # fmt: skip
    return table


def find_live_rows(table: Table, own: int = 0) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Find the records that no other record covers; among equal ones the first stays.

    A score covers another one with the same key if it starts no later and its K is no smaller; a rollout record, if it
    has no fewer rollouts and its K is no smaller. Records in segments below ``own`` come first.
    """
    live = np.ones(len(table), dtype=bool)
    reach = np.where(table["kind"] == SCORE, -table["start"].astype(np.int64), table["start"].astype(np.int64))
    order = np.lexsort((table["offset"], table["segment"], table["segment"] >= own, -reach,
                        -table["asked"].astype(np.int64), table["kind"], table["low"], table["high"]))  # fmt: skip
    sorted_rows = table[order]
    same = np.zeros(len(table), dtype=bool)
    same[1:] = True
    for name in ("high", "low", "kind"):
        same[1:] &= sorted_rows[name][1:] == sorted_rows[name][:-1]
    best = None  # the largest reach so far among records of this key whose K is no smaller
    for row in np.flatnonzero(same | np.append(same[1:], [False])):  # skips keys with one record
        far = int(reach[order[row]])
        if not same[row] or best is None or far > best:
            best = far
        else:
            live[order[row]] = False
    return live


def read_teachers(segments: list[Segment], table: Table) -> dict[int, TeacherIdentity]:
    """Read the teachers of a table by tag."""
    found: dict[int, TeacherIdentity] = {}
    for row in table[table["kind"] == IDENTITY]:
        if int(row["tag"]) not in found:
            with contextlib.suppress(CacheCorruptError):
                record = segments[int(row["segment"])].read(int(row["offset"]))
                found[int(row["tag"])] = record.identity()
    return found


def read_identities(path: str | os.PathLike[str]) -> dict[int, TeacherIdentity]:
    """Read the teachers of a cache by the tag in record headers."""
    with open_tables(Path(path)) as (segments, table):
        return read_teachers(segments, table)


def count_bytes(root: Path) -> int:
    """Count the bytes of segments and indexes."""
    return sum(file.stat().st_size for file in root.iterdir() if file.suffix in {".tkl", ".idx"})


def close_segments(segments: list[Segment]) -> None:
    """Close segments."""
    for segment in segments:
        segment.close()
