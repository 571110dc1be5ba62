"""``ScoreStore``: a folder of scores and rollouts that many processes may write to."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

import numpy as np

from topkd.offline.store.codecs import CODECS, CodecName, narrow_scores
from topkd.offline.store.folder import open_folder
from topkd.offline.store.index import Place, RecordIndex, make_place
from topkd.offline.store.keys import (
    Teacher,
    TeacherIdentity,
    check_token_array,
    compute_rollout_key,
    compute_score_key,
    to_identity,
)
from topkd.offline.store.maintenance import CacheStats, Verification, stats, verify
from topkd.offline.store.records import ALIGN, ROLLOUT, SCORE, Header, Record, build_rollout_record, build_score_record
from topkd.offline.store.segment_writer import SEGMENT_BYTES, RecordLog, SegmentWriter, adopt_orphans
from topkd.offline.store.segments import Segment, list_segments
from topkd.topk.errors import AlignmentError, CacheCorruptError, CacheError, ConfigError
from topkd.topk.maths.scalars import check_integer
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Int32, TopK

Mode: TypeAlias = Literal["r", "a"]
_LARGEST_K = 2**31 - 1


class ScoreStore:
    """A folder of scores and rollouts, each found by a hash of its request.

    ``get`` and ``put`` are safe from several threads; each process opens its own store on the same folder. A record is
    durable once ``commit`` has returned (``put`` commits by itself every ``group_records`` records or ``group_bytes``).

    Args:
        path: The folder; mode "a" creates it.
        mode: "r" reads, "a" reads and appends.
        codec: How new records are written: "packed" (18-bit ids, fp16 logprobs), "raw" (exact) or "cold" (zstd).
        segment_bytes: A segment that reaches this size is sealed, and a new one begins.
        group_records: Records per commit at most.
        group_bytes: Bytes per commit at most.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Mode = "r",
        codec: CodecName = "packed",
        segment_bytes: int = SEGMENT_BYTES,
        group_records: int = 64,
        group_bytes: int = 8 << 20,
    ) -> None:
        if mode not in {"r", "a"}:
            raise ConfigError("unknown cache mode", got=mode, expected="'r' or 'a'")
        if codec not in CODECS:
            raise ConfigError("unknown cache codec", got=codec, expected=", ".join(CODECS))
        self.path, self.mode, self.codec = Path(path), mode, codec
        self._options = {"segment_bytes": segment_bytes, "group_records": group_records, "group_bytes": group_bytes}
        open_folder(self.path, create=mode == "a")
        if mode == "a":
            adopt_orphans(self.path)
        self._lock = threading.RLock()
        self._log = RecordLog(
            self.path, segment_bytes=segment_bytes, group_records=group_records, group_bytes=group_bytes
        )
        self._segments: list[Segment | SegmentWriter] = []
        self._ordinal: dict[str, int] = {}  # file name -> its index in _segments
        self._growing: dict[str, int] = {}  # unsealed segments of other processes, and how far they were read
        self._record_index = RecordIndex()
        self._damaged: dict[tuple[int, int], str] = {}
        self.refresh()

    def get(self, teacher: Teacher, ids: Ids, start: int, k: int) -> TopK | None:
        """Return the stored rows, cut to ``start`` and ``k``; None when no record covers the request."""
        array = check_token_array(ids)
        check_request(array.size, start, k)
        record = self._read(compute_score_key(to_identity(teacher), array), SCORE, start, k)
        return None if record is None else narrow_scores(record.score()[1], start, k)

    def put(self, teacher: Teacher, ids: Ids, scores: TopK, *, asked: int | None = None) -> None:
        """Write scores, unless a stored record covers them.

        Args:
            teacher: The teacher that returned them.
            ids: The whole sequence; the rows must reach to its end.
            scores: The rows.
            asked: The K that was requested, if the server returned fewer columns and would do so again.
        """
        identity, array = to_identity(teacher), check_token_array(ids)
        check_stored_scores(array, scores)
        key, k = compute_score_key(identity, array), max(scores.k, check_asked_k(asked))
        with self._lock:
            if self._read(key, SCORE, scores.start, k) is not None:  # a damaged record does not count
                return
            self._check_writable()
            header, payload = build_score_record(identity, key, array, scores, codec=self.codec, asked=k)
            self._append(identity, header, payload)

    def get_rollouts(
        self,
        student: Teacher,
        prompt_ids: Ids,
        n: int | None,
        params: SamplingParams,
        *,
        k: int = 0,
        version: str = "",
        occurrence: int = 0,
    ) -> list[Rollout] | None:
        """Return n stored rollouts (n None: all) of exactly this request, with lists of at least k; else None."""
        key = compute_rollout_key(
            to_identity(student), check_token_array(prompt_ids), params, version=version, occurrence=occurrence
        )
        record = self._read(key, ROLLOUT, n or 0, k)
        return None if record is None else record.rollouts()[:n]

    def put_rollouts(
        self,
        student: Teacher,
        prompt_ids: Ids,
        rollouts: Sequence[Rollout],
        params: SamplingParams,
        *,
        k: int = 0,
        version: str = "",
        occurrence: int = 0,
    ) -> None:
        """Write the rollouts of one request, with exact logprobs, unless as many are stored."""
        identity, prompt = to_identity(student), check_token_array(prompt_ids)
        for rollout in rollouts:
            if not np.array_equal(rollout.prompt_ids, prompt):
                raise AlignmentError(
                    "a rollout has another prompt than its request", got=f"{rollout.prompt_ids[:8].tolist()}.."
                )
        key = compute_rollout_key(identity, prompt, params, version=version, occurrence=occurrence)
        self.keep_rollouts(identity, key, rollouts, k=k)

    def keep_rollouts(self, student: Teacher, key: bytes, rollouts: Sequence[Rollout], *, k: int = 0) -> None:
        """Write the rollouts of a request by its key, as copied from another cache."""
        identity, k = to_identity(student), check_asked_k(k)
        with self._lock:
            if self._read(key, ROLLOUT, len(rollouts), k) is not None:
                return
            self._check_writable()
            header, payload = build_rollout_record(identity, key, rollouts, codec=self.codec, asked=k)
            self._append(identity, header, payload)

    def covers(self, teacher: Teacher, ids: Ids, start: int, k: int, *, read: bool = False) -> bool:
        """Return whether ``get`` would find rows; ``read`` checks the record's checksums too."""
        key = compute_score_key(to_identity(teacher), check_token_array(ids))
        if read:
            return self._read(key, SCORE, start, k) is not None
        with self._lock:
            return bool(self._answers(key, SCORE, start, k))

    def list_stored(self, teacher: Teacher, ids: Ids) -> list[tuple[int, int]]:
        """List (start, K) of every record of these ids, for the error message of a miss."""
        with self._lock:
            places = self._record_index.find(compute_score_key(to_identity(teacher), check_token_array(ids)))
            return sorted({(place.start, place.asked) for place in places if place.kind == SCORE})

    def commit(self) -> int:
        """Make every written record durable; return how many records this object has made durable."""
        with self._lock:
            return self._log.commit()

    def refresh(self) -> None:
        """Read the index of records that other processes have written since."""
        with self._lock:
            for path in list_segments(self.path):
                ordinal = self._ordinal.get(path.name)
                if ordinal is None:
                    with contextlib.suppress(FileNotFoundError):  # removed by a compaction meanwhile
                        self._adopt(Segment(path), None)
                elif path.name in self._growing:
                    if path.with_suffix(".idx").exists():
                        self._adopt(Segment(path), ordinal)
                    else:
                        self._scan(path.name, ordinal)

    def records(self, *, kinds: Sequence[int] = (SCORE,), live: bool = True) -> Iterator[Record]:
        """Iterate over records in disk order; damaged ones are skipped and listed in ``damage``.

        Args:
            kinds: The kinds of records.
            live: Only records that ``get`` may return: no superseded ones and no duplicates.
        """
        with self._lock:
            segments = list(enumerate(self._segments))
        for ordinal, segment in segments:
            for offset in self._offsets(ordinal, segment, kinds):
                try:
                    record = self._fetch(ordinal, offset)
                except CacheCorruptError as error:
                    self._damaged[ordinal, offset] = str(error)
                    continue
                if not live or self._is_live(record, ordinal, offset):
                    yield record

    @property
    def damage(self) -> list[str]:
        """Damage found while reading; damaged records count as absent."""
        return list(self._damaged.values())

    def stats(self) -> CacheStats:
        """Count what the folder holds."""
        self.commit()
        return stats(self.path)

    def verify(self) -> Verification:
        """Read every byte and list the damaged parts."""
        self.commit()
        return verify(self.path)

    def close(self) -> None:
        """Commit and seal; the store can still be read."""
        with self._lock:
            sealed = self._log.close()
            if sealed is not None:
                self._adopt(Segment(sealed.path), self._ordinal.get(sealed.path.name))

    def __len__(self) -> int:
        """Count distinct keys (scores and rollouts)."""
        with self._lock:
            return self._record_index.count((SCORE, ROLLOUT))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        # A worker process opens the folder itself and writes to its own segment.
        return _reopen, (str(self.path), self.mode, self.codec, self._options)

    def _append(self, identity: TeacherIdentity, header: Header, payload: bytes) -> None:
        writer, offset = self._log.append(header, payload, identity)
        self._record_index.add(header.key, make_place(self._register_own(writer), offset, header))

    def _read(self, key: bytes, kind: int, start: int, k: int) -> Record | None:
        with self._lock:
            places = self._answers(key, kind, start, k)
        for place in places:
            try:
                record = self._fetch(place.segment, place.offset)
            except CacheCorruptError as error:
                self._damaged[place.segment, place.offset] = str(error)
                continue
            if record.header.key == key and record.header.kind == kind:
                return record
            where = f"{self._name(place.segment)} at {place.offset}"
            self._damaged[place.segment, place.offset] = f"the index points to another record ({where})"
        return None

    def _fetch(self, ordinal: int, offset: int) -> Record:
        segment = self._segments[ordinal]
        if isinstance(segment, Segment):
            return segment.read(offset)
        with self._lock:  # this process's segment object is replaced when it is sealed
            return self._segments[ordinal].read(offset)

    def _answers(self, key: bytes, kind: int, start: int, k: int) -> list[Place]:
        """List records that cover a request, widest first, then by file name and offset."""
        places = [
            place
            for place in self._record_index.find(key)
            if place.kind == kind
            and place.asked >= k
            and (place.start <= start if kind == SCORE else place.start >= start)
            and (place.segment, place.offset) not in self._damaged
        ]
        if len(places) > 1:
            places.sort(key=lambda place: (-place.asked, place.start, self._name(place.segment), place.offset))
        return places

    def _is_live(self, record: Record, ordinal: int, offset: int) -> bool:
        header = record.header
        with self._lock:
            answers = self._answers(header.key, header.kind, header.start, header.asked)
        return bool(answers) and (answers[0].segment, answers[0].offset) == (ordinal, offset)

    def _offsets(self, ordinal: int, segment: Segment | SegmentWriter, kinds: Sequence[int]) -> list[int]:
        if isinstance(segment, Segment) and segment.index is not None:
            entries = segment.index.entries
            return [int(offset) for offset in np.sort(entries["offset"][np.isin(entries["kind"], list(kinds))])]
        with self._lock:
            return self._record_index.offsets(ordinal, kinds)

    def _adopt(self, segment: Segment, ordinal: int | None) -> None:
        if ordinal is None:
            ordinal = len(self._segments)
            self._segments.append(segment)
            self._ordinal[segment.name] = ordinal
        else:
            self._record_index.forget(ordinal)
            self._segments[ordinal] = segment
        self._growing.pop(segment.name, None)
        if segment.index is not None:
            self._record_index.add_sorted(ordinal, segment.index)
        else:
            self._growing[segment.name] = ALIGN
            self._scan(segment.name, ordinal)

    def _scan(self, name: str, ordinal: int) -> None:
        segment = self._segments[ordinal]
        assert isinstance(segment, Segment)  # noqa: S101 - only others' segments are in _growing
        scan = segment.scan(self._growing[name])
        self._growing[name] = scan.end
        for offset, header in scan.found:
            self._record_index.add(header.key, make_place(ordinal, offset, header))

    def _register_own(self, writer: SegmentWriter) -> int:
        name = writer.path.name
        if name not in self._ordinal:
            for path, ordinal in list(self._ordinal.items()):
                if isinstance(self._segments[ordinal], SegmentWriter):  # the previous segment is sealed now
                    self._adopt(Segment(self.path / path), ordinal)
            self._ordinal[name] = len(self._segments)
            self._segments.append(writer)
        return self._ordinal[name]

    def _name(self, ordinal: int) -> str:
        return self._segments[ordinal].path.name

    def _check_writable(self) -> None:
        if self.mode != "a":
            raise CacheError("the cache is open for reading only", where=str(self.path), hint='open it with mode="a"')


def _reopen(path: str, mode: Mode, codec: CodecName, options: dict[str, int]) -> ScoreStore:
    return ScoreStore(path, mode=mode, codec=codec, **options)


def open_store(path: str | Path, mode: Mode = "r") -> ScoreStore:
    """Open the score cache in a folder: "r" to read, "a" to read and append (a missing folder is created)."""
    return ScoreStore(path, mode=mode)


def check_request(tokens: int, start: int, k: int) -> None:
    """Check that the start is within the sequence and K is not negative."""
    if not 0 <= start < tokens:
        raise ConfigError("score request: start out of range", got=start, expected=f"0..{tokens - 1}")
    if k < 0:
        raise ConfigError("score request: k is negative", got=k)


def check_asked_k(asked: object) -> int:
    """Return the requested K; None gives 0, which stands for the width of the rows."""
    number = 0 if asked is None else check_integer("the requested K", asked)
    if not 0 <= number <= _LARGEST_K:
        raise ConfigError("the requested K is out of range", got=number, expected=f"0..{_LARGEST_K}")
    return number


def check_stored_scores(ids: Int32, scores: TopK) -> None:
    """Check that the rows reach the end of the sequence and have its tokens as realised tokens."""
    expected = ids.size - 1 - scores.start
    if scores.rows != expected:
        raise AlignmentError("scores do not reach to the end of their sequence", got=scores.rows, expected=expected)
    known = scores.actual_ids >= 0
    wrong = known & (scores.actual_ids != ids[scores.start + 1 :])
    if wrong.any():
        row = int(np.argmax(wrong))
        raise AlignmentError(
            "the scores belong to another sequence",
            where=f"row {row}",
            got=f"token {scores.actual_ids[row]}",
            expected=f"token {ids[scores.start + 1 + row]}",
        )
