"""Segments: append-only files of records with one writer each; a sealed one has an index file.

This module only reads; ``segment_writer`` writes.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from topkd.offline.store.index import ENTRY_BYTES, SortedIndex
from topkd.offline.store.records import ALIGN, MAGIC, Header, Record, read_header, unpack_header, verify_record
from topkd.topk.errors import CacheCorruptError, CacheError

VERSION = 1
TORN = "incomplete last record"
_CHUNK = 1 << 20
SEGMENT_MAGIC = b"TKLSEG\r\n"  # the line end detects a copy in text mode
INDEX_MAGIC = b"TKLIDX\r\n"
SEGMENT_HEADER = struct.Struct("<8sHH4x12sIQQ8x")  # magic, version, header bytes, writer, number, host, created (ns)
INDEX_HEADER = struct.Struct(
    "<8sHH4xQQQQ8x"
)  # magic, version, header bytes, entries, end of data, payload bytes, check
CHECK = struct.Struct("<Q")
_NAME = re.compile(r"seg-[0-9a-f]{12}-\d{6}\.tkl")


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged part of a segment.

    Attributes:
        segment: File name.
        offset: First byte.
        size: Number of bytes.
        what: What is wrong, as text.
        fatal: False for what a crash leaves (an incomplete last record): no acknowledged record is lost.
    """

    segment: str
    offset: int
    size: int
    what: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.segment} at {self.offset}: {self.what} ({self.size} bytes)"


@dataclass(frozen=True, slots=True)
class Scan:
    """Result of reading a segment's bytes."""

    found: list[tuple[int, Header]]
    damage: list[Damage]
    end: int  # end of the last complete record


def make_version_error(path: Path, version: int) -> CacheError:
    """Build the error for a cache of a later format."""
    what, got = "the cache was written by a newer topkd", f"format {version}"
    return CacheError(what, where=str(path), got=got, expected=f"at most {VERSION}", hint="upgrade topkd")


def list_segments(root: Path) -> list[Path]:
    """List the segments of a store by name."""
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name))


class Segment:
    """A segment, for reading. A sealed one is memory-mapped; one that may still change is read by position."""

    _fd = -1

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.index: SortedIndex | None = None
        self.damage: list[Damage] = []
        self._map: mmap.mmap | None = None
        self._view = memoryview(b"")
        self._seen = bytearray()  # a bit for each 64 bytes already checked: 2 MiB for a segment of 1 GiB
        self._fd = os.open(path, os.O_RDONLY)
        self.end = 0
        self.host: int | None = None  # of the writer; None if the header is damaged
        try:
            self._check_header()
            self._load_index()
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Current size of the file in bytes."""
        return self._map.size() if self._map is not None else os.fstat(self._fd).st_size

    def read(self, offset: int) -> Record:
        """Read the record at an offset and check its checksums."""
        # Sealed bytes do not change: header and payload are checked once per process, when they are first read.
        byte, bit = offset // (8 * ALIGN), 1 << (offset // ALIGN & 7)
        if not self._seen and self._map is not None:
            self._seen = bytearray(self._map.size() // (8 * ALIGN) + 1)
        mapped = byte < len(self._seen)  # the index of a truncated file also has records beyond its end
        if mapped and self._seen[byte] & bit:
            header = unpack_header(self._view, offset)
            return Record(header, self._view[offset + ALIGN : offset + ALIGN + header.size])
        checked = read_header(self._bytes(offset, ALIGN))
        if checked is None:
            raise CacheCorruptError("the header of a record is damaged", where=f"{self.name} at {offset}")
        record = verify_record(checked, self._bytes(offset + ALIGN, checked.size), f"{self.name} at {offset}")
        if mapped:
            self._seen[byte] |= bit
        return record

    def forget_checks(self) -> None:
        """Free the note of which records were checked; each is checked again when it is read again."""
        self._seen = bytearray()

    def scan(self, first: int = ALIGN, *, payloads: bool = False) -> Scan:
        """Read every complete record from ``first`` on; report and skip damaged bytes.

        The length in a damaged header is not known, so the scan continues at the next 64-byte boundary with a valid
        header.
        """
        size = self.size
        found: list[tuple[int, Header]] = []
        damage: list[Damage] = []
        position = end = first
        while position < size:
            header = read_header(self._bytes(position, ALIGN))
            if header is None or position + header.span > size:
                following = self._next_header(position + ALIGN, size)
                if following is None:
                    damage.append(Damage(self.name, position, size - position, TORN, fatal=False))
                    break
                damage.append(Damage(self.name, position, following - position, "damaged record header"))
                position = following
                continue
            body = self._bytes(position + ALIGN, header.span - ALIGN) if payloads else memoryview(b"")
            if payloads and _digest(body[: header.size]) != header.check:
                damage.append(Damage(self.name, position, header.span, "wrong record checksum"))
            else:
                found.append((position, header))
                if payloads and any(body[header.size :]):
                    damage.append(Damage(self.name, position, header.span, "padding is not zero", fatal=False))
            position = end = position + header.span
        return Scan(found, damage, end)

    def close(self) -> None:
        """Close the file; arrays that are views of it keep the mapping alive."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._map, self._view = None, memoryview(b"")

    def __del__(self) -> None:
        self.close()  # runs only when no thread uses the segment any more

    def _check_header(self) -> None:
        block = os.pread(self._fd, ALIGN, 0)
        if len(block) < ALIGN:
            return  # created but not yet written: it has no record
        if CHECK.unpack_from(block, 56)[0] != xxhash.xxh3_64_intdigest(block[:56]) or block[:8] != SEGMENT_MAGIC:
            # The records have their own checksums and can still be read.
            self.damage.append(Damage(self.name, 0, ALIGN, "damaged segment header"))
            return
        _, version, _, _, _, self.host, _ = SEGMENT_HEADER.unpack_from(block)
        if version > VERSION:
            raise make_version_error(self.path, version)

    def _load_index(self) -> None:
        loaded = read_index(self.path.with_suffix(".idx"))
        if loaded is None:
            return
        if isinstance(loaded, str):
            self.damage.append(Damage(self.path.with_suffix(".idx").name, 0, 0, loaded))
            return
        self.index, self.end = loaded
        size = os.fstat(self._fd).st_size
        if size < self.end:
            lost = int((self.index.entries["offset"] >= size).sum())
            what = f"truncated from {self.end} bytes; at least {max(lost, 1)} record(s) lost"
            self.damage.append(Damage(self.name, size, self.end - size, what))
        elif size > self.end:
            self.damage.append(Damage(self.name, self.end, size - self.end, "bytes after the sealed end"))
        if size:
            self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
            self._view = memoryview(self._map)
            os.close(self._fd)  # the map has its own descriptor; two per segment would soon be too many
            self._fd = -1

    def _bytes(self, offset: int, size: int) -> memoryview:
        if self._map is not None:
            return self._view[offset : offset + size]
        return memoryview(os.pread(self._fd, size, offset))

    def _next_header(self, first: int, size: int) -> int | None:
        """Find the first aligned offset from ``first`` on with a complete record."""
        for chunk in range(first, size, _CHUNK):
            block = self._bytes(chunk, min(_CHUNK, size - chunk))
            words = np.frombuffer(block, "<u4", len(block) // ALIGN * (ALIGN // 4)).reshape(-1, ALIGN // 4)
            for row in np.flatnonzero(words[:, 0] == int.from_bytes(MAGIC, "little")):
                offset = chunk + int(row) * ALIGN
                header = read_header(self._bytes(offset, ALIGN))
                if header is not None and offset + header.span <= size:
                    return offset
        return None


def read_index(path: Path) -> tuple[SortedIndex, int] | str | None:
    """Read an index and the end of its segment's data; return a message if it is damaged, None if it is absent."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    except FileNotFoundError:
        return None
    if len(view) < ALIGN or view[:8] != INDEX_MAGIC or CHECK.unpack_from(view, 56)[0] != _digest(view[:56]):
        return "damaged index header"
    _, version, _, count, end, length, check = INDEX_HEADER.unpack_from(view)
    payload = view[ALIGN:]
    if version > VERSION or length != len(payload) or count * ENTRY_BYTES != length or check != _digest(payload):
        return "wrong index checksum"
    return SortedIndex.from_buffer(payload, count), end


def _digest(view: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(view)
