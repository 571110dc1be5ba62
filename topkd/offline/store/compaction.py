"""``gc`` rewrites a cache without records that are no longer needed; ``merge`` copies several caches into one."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from topkd.offline.store.codecs import CodecName
from topkd.offline.store.folder import describe_disk_error, open_folder
from topkd.offline.store.keys import TeacherIdentity
from topkd.offline.store.records import IDENTITY, ROLLOUT, Header, Record, build_rollout_record, build_score_record
from topkd.offline.store.segment_writer import SEGMENT_BYTES, RecordLog, adopt_orphans
from topkd.offline.store.segments import Damage, Segment, read_index
from topkd.offline.store.tables import SpooledRows, add_teacher, close_segments, count_bytes, iter_tables
from topkd.topk.errors import CacheCorruptError, CacheError, ConfigError


@dataclass(frozen=True, slots=True)
class Compaction:
    """Result of ``gc`` or ``merge``."""

    copied: int
    dropped: int
    bytes_before: int
    bytes_after: int
    damage: list[Damage] = field(default_factory=list)


def gc(
    path: str | os.PathLike[str],
    *,
    codec: CodecName | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    foreign: bool = False,
) -> Compaction:
    """Rewrite the sealed segments with live records only, then remove the old ones.

    Superseded records, duplicates and damaged bytes are removed. Segments that a process is writing are not touched,
    and readers that have the old files open can still read them. A crash may leave duplicates, but never loses a
    record.

    Args:
        path: The cache.
        codec: Encode the lists again with it ("cold" for an archive; packed to cold and back changes no value).
        segment_bytes: Size at which a new segment begins.
        foreign: Also seal and rewrite segments that crashed writers on other machines left. Use it only when no other
            machine writes to the cache.
    """
    root = Path(path)
    open_folder(root, create=False)
    with _hold_compaction_lock(root):
        before = count_bytes(root)
        for index in root.glob("seg-*.idx"):
            if isinstance(read_index(index), str) or not index.with_suffix(".tkl").exists():
                index.unlink(missing_ok=True)  # its segment is sealed again below, or is gone
        damage = adopt_orphans(root, foreign=foreign)
        # A damaged record must not make a sound one of the same key superfluous: everything is read first.
        with _open_spooled(root, [root], damage=damage, only_sealed=True) as (segments, rows, names):
            rows.mark_live()
            log = RecordLog(root, segment_bytes=segment_bytes)
            copied = _copy(segments, rows, names, log, codec=codec, damage=damage)
            log.close()
            for file in (segment.path for segment in segments if segment.index is not None):
                file.unlink(missing_ok=True)
                file.with_suffix(".idx").unlink(missing_ok=True)
            for stray in root.glob("*.tmp"):
                stray.unlink(missing_ok=True)
    return Compaction(copied, rows.count - copied, before, count_bytes(root), damage)


def merge(
    sources: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str], *, segment_bytes: int = SEGMENT_BYTES
) -> Compaction:
    """Copy the records that the target lacks from other caches, byte for byte; sources are only read."""
    root = Path(target)
    if any(root.resolve() == Path(source).resolve() for source in sources):
        raise ConfigError("a cache cannot be merged into itself", got=str(root))
    for source in sources:
        open_folder(Path(source), create=False)
    open_folder(root, create=True)
    adopt_orphans(root)
    damage: list[Damage] = []
    before = count_bytes(root)
    with _open_spooled(root, [root, *map(Path, sources)], damage=damage) as (segments, rows, names):
        own = sum(segment.path.parent == root for segment in segments)
        rows.mark_live(own)
        log = RecordLog(root, segment_bytes=segment_bytes)
        copied = _copy(segments, rows, names, log, first=own, damage=damage)
        log.close()
    offered = rows.count - rows.count_before(own)
    return Compaction(copied, offered - copied, before, count_bytes(root), damage)


@contextlib.contextmanager
def _open_spooled(
    target: Path, roots: Sequence[Path], *, damage: list[Damage] | None = None, only_sealed: bool = False
) -> Iterator[tuple[list[Segment], SpooledRows, dict[int, TeacherIdentity]]]:
    """Open every segment of some caches, with their rows in a file, and the teachers by tag.

    ``only_sealed``: a record that another process has not yet committed must not make a durable one superfluous.
    """
    segments: list[Segment] = []
    names: dict[int, TeacherIdentity] = {}
    with contextlib.closing(SpooledRows(target)) as rows:
        try:
            for folder in roots:
                for segment, table in iter_tables(folder, first=len(segments), damage=damage):
                    segments.append(segment)
                    rows.append(table[:0] if only_sealed and segment.index is None else table)
                    for row in table[table["kind"] == IDENTITY]:
                        add_teacher(names, segment, row)
                    segment.forget_checks()
            yield segments, rows, names
        finally:
            close_segments(segments)


def _copy(
    segments: list[Segment],
    rows: SpooledRows,
    names: dict[int, TeacherIdentity],
    log: RecordLog,
    *,
    damage: list[Damage],
    first: int = 0,
    codec: CodecName | None = None,
) -> int:
    """Copy the live records of the segments from ``first`` on, in their order."""
    copied = 0
    for position, segment in enumerate(segments[first:], start=first):
        for offset in rows.find_live_offsets(position).tolist():
            try:
                record = segment.read(offset)
            except CacheCorruptError:
                damage.append(Damage(segment.name, offset, 0, "damaged record; it is left out"))
                continue
            identity = names.get(record.header.tag)
            if codec is None or identity is None:
                log.append(record.header, bytes(record.payload), identity)
            else:
                log.append(*_recode(record, identity, codec), identity)
            copied += 1
        segment.forget_checks()
    return copied


def _recode(record: Record, identity: TeacherIdentity, codec: CodecName) -> tuple[Header, bytes]:
    header = record.header
    if header.kind == ROLLOUT:
        return build_rollout_record(identity, header.key, record.rollouts(), codec=codec, asked=header.asked)
    ids, scores = record.score()
    return build_score_record(identity, header.key, ids, scores, codec=codec, asked=header.asked)


@contextlib.contextmanager
def _hold_compaction_lock(root: Path) -> Iterator[None]:
    try:
        fd = os.open(root / ".gc.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise describe_disk_error("cannot compact the cache", root, error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CacheError("another process is compacting this cache", where=str(root)) from error
        yield
    finally:
        os.close(fd)
