"""The indexes of a whole folder as one table."""

from __future__ import annotations

import contextlib
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from topkd.offline.store.folder import describe_disk_error, open_folder
from topkd.offline.store.index import ENTRY
from topkd.offline.store.keys import TeacherIdentity
from topkd.offline.store.records import IDENTITY, ROLLOUT, SCORE, Header
from topkd.offline.store.segments import Damage, Segment, list_segments
from topkd.topk.errors import CacheCorruptError

PART_ROWS = 1 << 17  # about 40 MB while they are compared
ROW = np.dtype([("high", "<u8"), ("segment", "<u4"), *[(name, ENTRY[name]) for name in ENTRY.names or ()]])


Table: TypeAlias = np.ndarray[Any, Any]


def read_tables(root: Path, *, damage: list[Damage] | None = None) -> tuple[list[Segment], Table]:
    """Read the segments of a folder, and one row for each record; see ``iter_tables``."""
    read = list(iter_tables(root, damage=damage))
    return [segment for segment, _ in read], concat_tables([table for _, table in read])


def iter_tables(root: Path, *, first: int = 0, damage: list[Damage] | None = None) -> Iterator[tuple[Segment, Table]]:
    """Open the segments of a folder one by one, each with one row for each record.

    Args:
        root: The folder.
        first: Number of the first segment.
        damage: Given, every record is read: only those that hold have a row, and the damage is appended here.
    """
    position = first
    for path in list_segments(root):
        try:
            segment = Segment(path)
        except FileNotFoundError:
            continue
        if segment.index is None or damage is not None:
            scan = segment.scan(payloads=damage is not None)
            table = tabulate_headers(position, scan.found)
            if damage is not None:
                damage += [item for item in segment.damage + scan.damage if item.fatal]
        else:
            table = np.zeros(len(segment.index.high), ROW)
            table["high"], table["segment"] = segment.index.high, position
            for name in ENTRY.names or ():
                table[name] = segment.index.entries[name]
        position += 1
        yield segment, table


class SpooledRows:
    """Rows of scores and rollouts in an unnamed file, of which a part is in memory at a time.

    A part is a range of keys: whether a record is superfluous depends only on records of its own key.

    Attributes:
        count: Rows.
    """

    def __init__(self, folder: Path) -> None:
        self.count = 0
        self._ends = [0]
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - ``close`` closes it
        except OSError as error:
            raise describe_disk_error("cannot write to the cache", folder, error) from error

    def close(self) -> None:
        """Close the file, which is then gone."""
        self._file.close()

    def append(self, table: Table) -> None:
        """Add the rows of the next segment; records that answer nothing are left out."""
        rows = select_answer_rows(table)
        rows = rows[np.argsort(rows["high"], kind="stable")]
        rows["reserved"] = 0
        try:
            self._file.write(rows.tobytes())
            self._file.flush()
        except OSError as error:
            raise describe_disk_error("cannot write to the cache", self._folder, error) from error
        self.count += len(rows)
        self._ends.append(self.count)

    def mark_live(self, own: int = 0) -> None:
        """Mark the rows that ``find_live_rows`` finds."""
        rows = self._map()
        parts = -(-self.count // PART_ROWS)
        starts = self._ends[:-1]
        for part in range(1, parts + 1):
            edge = 2**64 * part // parts
            stops = [
                end if part == parts else bisect_left(rows["high"], edge, start, end)
                for start, end in zip(starts, self._ends[1:], strict=True)
            ]
            ranges = [slice(*bounds) for bounds in zip(starts, stops, strict=True)]
            live = find_live_rows(concat_tables([rows[each] for each in ranges]), own)
            for each in ranges:
                size = each.stop - each.start
                rows["reserved"][each], live = live[:size], live[size:]
            starts = stops

    def find_live_offsets(self, segment: int) -> NDArray[np.uint64]:
        """Find the offsets of a segment's marked rows, in order."""
        rows = self._map()[self._ends[segment] : self._ends[segment + 1]]
        return np.sort(rows["offset"][rows["reserved"] == 1])

    def count_before(self, segment: int) -> int:
        """Count the rows of the segments before this one."""
        return self._ends[segment]

    def _map(self) -> Table:
        if not self.count:
            return np.zeros(0, ROW)
        return np.memmap(self._file, ROW, "r+", shape=(self.count,))


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
        add_teacher(found, segments[int(row["segment"])], row)
    return found


def add_teacher(found: dict[int, TeacherIdentity], segment: Segment, row: Table) -> None:
    """Add the teacher that a row of a segment names, unless its tag is known."""
    if int(row["tag"]) not in found:
        with contextlib.suppress(CacheCorruptError):
            found[int(row["tag"])] = segment.read(int(row["offset"])).identity()


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
