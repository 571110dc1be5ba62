"""Writer of one segment: exclusive creation, and a lock held while it is open.

An unsealed segment whose lock is free was abandoned by its writer: the next process that opens the store for writing
cuts off an incomplete last record and seals the segment.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
import uuid
from pathlib import Path

import xxhash

from topkd.files import write_atomically
from topkd.offline.store.folder import describe_disk_error
from topkd.offline.store.index import SortedIndex
from topkd.offline.store.keys import TeacherIdentity
from topkd.offline.store.records import ALIGN, Header, Record, build_identity_record, read_header, verify_record
from topkd.offline.store.segments import (
    CHECK,
    INDEX_HEADER,
    INDEX_MAGIC,
    SEGMENT_HEADER,
    SEGMENT_MAGIC,
    VERSION,
    Damage,
    Segment,
    list_segments,
)
from topkd.topk.errors import CacheCorruptError, CacheError

_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has only fsync
SEGMENT_BYTES = 1 << 30
SEGMENT_RECORDS = 1 << 18  # a reader must scan these, at about 2 us each, after a writer died


class SegmentWriter:
    """The only writer of a new segment; ``sync`` makes appended records durable."""

    def __init__(self, root: Path, writer: str, number: int) -> None:
        self._fd = -1
        self.path, self.end, self.synced = root, 0, 0
        self.entries: list[tuple[int, Header]] = []
        while self._fd < 0:
            self.path = root / f"seg-{writer}-{number:06d}.tkl"
            with contextlib.suppress(FileExistsError):
                self._fd = self._claim()
            number += 1
        self.number = number - 1
        packed = SEGMENT_HEADER.pack(
            SEGMENT_MAGIC, VERSION, ALIGN, writer.encode(), self.number, find_host_id(), time.time_ns()
        )
        self._write(packed + CHECK.pack(xxhash.xxh3_64_intdigest(packed)))

    def append(self, header: Header, payload: bytes) -> int:
        """Write a record and return its offset; after an error the file is unchanged."""
        offset = self.end
        self._write(header.to_bytes() + payload + bytes(header.span - ALIGN - header.size))
        self.entries.append((offset, header))
        return offset

    def read(self, offset: int) -> Record:
        """Read a record of this segment, durable or not."""
        if self._fd < 0:
            return Segment(self.path).read(offset)
        where = f"{self.path} at {offset}"
        header = read_header(os.pread(self._fd, ALIGN, offset))
        if header is None:
            raise CacheCorruptError("the header of a record is damaged", where=where)
        return verify_record(header, memoryview(os.pread(self._fd, header.size, offset + ALIGN)), where)

    def sync(self) -> None:
        """Wait until every appended record is on disk."""
        if self.synced == self.end:
            return
        try:
            _sync_data(self._fd)
            if not self.synced:
                _sync_folder(self.path.parent)  # the file name must be durable too
        except OSError as error:
            raise CacheError(
                "the cache could not be written to the disk", where=str(self.path), got=error.strerror
            ) from error
        self.synced = self.end

    def close(self) -> None:
        """Make records durable and seal the segment; remove it when it has none."""
        if self._fd < 0:
            return
        try:
            if self.entries:
                self.sync()
                # The index is optional: on a full disk the segment stays unsealed and is scanned instead.
                with contextlib.suppress(OSError):
                    write_index(self.path, self.entries, self.end)
            else:
                self.path.unlink(missing_ok=True)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file without sealing it (a forked child's copy, or after a failure)."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.abandon()

    def _claim(self) -> int:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
        except FileExistsError:
            raise
        except OSError as error:
            raise describe_disk_error("cannot write to the cache", self.path.parent, error) from error
        # Between creation and lock another process may seal the file as abandoned: then take the next number.
        if not _lock(fd) or os.fstat(fd).st_nlink == 0 or self.path.with_suffix(".idx").exists():
            os.close(fd)
            return -1
        return fd

    def _write(self, block: bytes) -> None:
        written = 0
        try:
            while written < len(block):
                written += os.pwrite(self._fd, block[written:] if written else block, self.end + written)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.end)  # if this fails, readers skip the incomplete record
            raise CacheError(
                "cannot write to the cache",
                where=str(self.path),
                got=error.strerror,
                hint="committed records are safe; free some space and run again",
            ) from error
        self.end += len(block)


def find_host_id() -> int:
    """Return this machine's id: on a network file system, locks say nothing about other machines."""
    return xxhash.xxh3_64_intdigest(socket.gethostname().encode())


def adopt_orphans(root: Path, *, foreign: bool = False) -> list[Damage]:
    """Seal every unsealed segment that no process is writing; return the damage found.

    Args:
        root: The folder.
        foreign: Also seal segments of other machines, which can be read without it. Use it only when no other machine
            writes to the folder.
    """
    damage: list[Damage] = []
    for path in list_segments(root):
        if path.with_suffix(".idx").exists():
            continue
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError:
            continue  # read-only, or gone meanwhile
        try:
            if not _lock(fd) or os.fstat(fd).st_nlink == 0 or path.with_suffix(".idx").exists():
                continue
            segment = Segment(path)
            try:
                if segment.host not in {None, find_host_id()} and not foreign:
                    continue
                scan = segment.scan(payloads=True)
            finally:
                segment.close()
            damage += scan.damage
            if scan.found or any(item.fatal for item in scan.damage):
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, max(scan.end, ALIGN))
                    write_index(path, scan.found, max(scan.end, ALIGN))
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(fd)
    return damage


def write_index(path: Path, found: list[tuple[int, Header]], end: int) -> None:
    """Write a segment's index beside it and rename it into place, which seals the segment."""
    payload = SortedIndex.build(found).to_bytes()
    packed = INDEX_HEADER.pack(
        INDEX_MAGIC, VERSION, ALIGN, len(found), end, len(payload), xxhash.xxh3_64_intdigest(payload)
    )
    write_atomically(path.with_suffix(".idx"), packed + CHECK.pack(xxhash.xxh3_64_intdigest(packed)) + payload)
    _sync_folder(path.parent)


def is_locked_by_writer(path: Path) -> bool:
    """Return whether a process is writing this segment."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _lock(fd)
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class RecordLog:
    """Appends records of one process; a new segment starts when the last is full or the process has forked."""

    def __init__(
        self,
        root: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        group_records: int = 64,
        group_bytes: int = 8 << 20,
    ) -> None:
        self.root, self.segment_bytes = root, segment_bytes
        self.group_records, self.group_bytes = group_records, group_bytes
        self.acknowledged = 0  # records that are known to be on the disk
        self._waiting = self._number = 0
        self._named: set[int] = set()
        self._writer: SegmentWriter | None = None
        self._pid, self._id = os.getpid(), uuid.uuid4().hex[:12]

    def append(self, header: Header, payload: bytes, identity: TeacherIdentity | None) -> tuple[SegmentWriter, int]:
        """Write one record, after its teacher's identity if the segment lacks it; commit when the group is full."""
        writer = self._current_segment()
        if identity is not None and header.tag not in self._named:
            writer.append(*build_identity_record(identity))
            self._named.add(header.tag)
        offset = writer.append(header, payload)
        self._waiting += 1
        if self._waiting >= self.group_records or writer.end - writer.synced >= self.group_bytes:
            self.commit()
        return writer, offset

    def commit(self) -> int:
        """Make everything appended durable; return how many records are."""
        if self._writer is not None and self._pid == os.getpid():
            self._writer.sync()
            self.acknowledged += self._waiting
            self._waiting = 0
        return self.acknowledged

    def close(self) -> SegmentWriter | None:
        """Commit and seal; return the sealed segment."""
        writer, self._writer = self._writer, None
        self._named.clear()
        if writer is None:
            return None
        if self._pid != os.getpid():
            writer.abandon()
            return None
        writer.close()
        self.acknowledged += self._waiting
        self._waiting = 0
        return writer if writer.entries else None

    def _current_segment(self) -> SegmentWriter:
        if self._pid != os.getpid():
            # After a fork the segment is the parent's: two writers in one file would overwrite each other.
            if self._writer is not None:
                self._writer.abandon()
            self._writer, self._waiting, self.acknowledged = None, 0, 0
            self._named.clear()
            self._pid, self._id, self._number = os.getpid(), uuid.uuid4().hex[:12], 0
        writer = self._writer
        if writer is not None and (writer.end >= self.segment_bytes or len(writer.entries) >= SEGMENT_RECORDS):
            self.close()
            writer = None
        if writer is None:
            writer = self._writer = SegmentWriter(self.root, self._id, self._number)
            self._number = writer.number + 1
        return writer
