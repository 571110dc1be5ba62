"""Log of one process's records: segments that roll over, teachers named once, grouped commits."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from topkd.offline.store.keys import TeacherIdentity
from topkd.offline.store.records import Header, build_identity_record
from topkd.offline.store.segment_writer import SegmentWriter

SEGMENT_BYTES = 1 << 30
SEGMENT_RECORDS = 1 << 18  # what a reader must scan, at about 2 us each, when a writer died


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

    @property
    def writer(self) -> SegmentWriter | None:
        """The segment that is being written."""
        return self._writer

    def append(self, header: Header, payload: bytes, identity: TeacherIdentity | None) -> tuple[SegmentWriter, int]:
        """Write one record, after its teacher's name where the segment lacks it; commit a full group."""
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
