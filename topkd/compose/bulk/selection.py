"""The rows of a data file that a job scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

from topkd.compose.bulk.score_config import ScoreConfig, TeacherAddress
from topkd.compose.data.files import RowChunk, count_rows
from topkd.compose.data.sequences import BadRow, Item, ScoreInput, read_sequences
from topkd.compose.teachers.served import IN_PROCESS
from topkd.topk.errors import DataError


class Selection:
    """The rows within the limit that belong to this shard, without duplicates if the config says so.

    Shards are cut by row number; with ``dedupe`` by content, so that equal rows are in one shard.

    Args:
        config: Of the job.
        tokenizer: For rows of text.
        chunk: Only these rows of the data.
    """

    def __init__(self, config: ScoreConfig, tokenizer: Any, chunk: RowChunk | None = None) -> None:
        self.config, self.tokenizer, self.chunk = config, tokenizer, chunk
        self.duplicates = self.skipped = 0
        self._teachers = config.addresses()
        self._sizes = {name: _read_vocab_size(address) for name, address in self._teachers.items()}

    def __iter__(self) -> Iterator[Item]:
        config, seen = self.config, set[bytes]()
        self.duplicates = self.skipped = 0
        shard, shards = config.shard
        rows = read_sequences(config.data, self.tokenizer, self.chunk)
        first = 0 if self.chunk is None else self.chunk.first
        limit = config.limit if self.chunk is None else None  # chunks were cut within it
        for place, item in enumerate(islice(rows, limit), first):
            digest = digest_sequence(item) if config.dedupe and isinstance(item, ScoreInput) else None
            shard_key = place if digest is None else int.from_bytes(digest[:8], "little")
            if shard_key % shards != shard - 1:
                continue
            if digest is not None:
                if digest in seen:
                    self.duplicates += 1
                    continue
                seen.add(digest)
            if isinstance(item, ScoreInput) and item.teacher_id not in self._teachers:
                if config.teacher_id:
                    self.skipped += 1
                    continue
                yield self._refuse_teacher(item)
            else:
                yield self._check_vocabulary(item) if isinstance(item, ScoreInput) else item

    def estimate_rows(self) -> int:
        """Estimate how many rows there are; 0 when that is not known."""
        rows = count_rows(self.config.data)
        rows = rows if self.config.limit is None else min(rows, self.config.limit)
        return -(-rows // self.config.shard[1])

    @property
    def unbounded(self) -> bool:
        """Whether a teacher's vocabulary size is not known, so that its ids cannot be checked."""
        return None in self._sizes.values()

    def _check_vocabulary(self, item: ScoreInput) -> Item:
        """Return the row, or the reason why its teacher cannot score it."""
        size, largest_id = self._sizes[item.teacher_id], int(item.ids.max(initial=0))
        if size is None or largest_id < size:
            return item
        return BadRow(item.number, DataError(
            "a row has an id outside the teacher's vocabulary", where=f"{self.config.data}:{item.number}",
            got=largest_id, expected=f"below {size}",
        ))  # fmt: skip

    def _refuse_teacher(self, item: ScoreInput) -> BadRow:
        routes, name = self.config.routes, item.teacher_id
        if not name:
            hint = "name the row's teacher_id"
        elif routes:
            hint = "give its server with --teacher-id NAME=URL"
        else:
            hint = f"--teacher-id {name} beside --teacher scores its rows, --teacher-id NAME=URL those of several"
        return BadRow(item.number, DataError(
            "a row is for another teacher", where=f"{self.config.data}:{item.number}",
            got=repr(name) if name else "none",
            expected="one of " + ", ".join(map(repr, routes)) if routes else "a row that names no teacher", hint=hint,
        ))  # fmt: skip


def _read_vocab_size(address: TeacherAddress) -> int | None:
    """Return a teacher's vocabulary size: the configured one, or that of a model that is loaded in this process."""
    if address.vocab_size is not None or not address.urls[0].startswith(IN_PROCESS):
        return address.vocab_size
    try:
        config = json.loads(
            (Path(address.urls[0].removeprefix(IN_PROCESS)) / "config.json").read_text(encoding="utf-8")
        )
        size = config.get("text_config", config).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None  # loading the model reports what is wrong
    return size if isinstance(size, int) and size > 0 else None


class Claim(Enum):
    """Whether a row may be asked for."""

    ASK = "ask"
    ELSEWHERE = "elsewhere"  # an equal row is being asked by another worker
    CAP = "cap"


def digest_sequence(item: ScoreInput) -> bytes:
    """Digest a sequence, its start and its teacher to 16 bytes."""
    start = item.start.to_bytes(8, "little")
    teacher = hashlib.blake2b(item.teacher_id.encode()).digest() if item.teacher_id else b""
    return hashlib.blake2b(item.ids.tobytes(), digest_size=16, salt=start, key=teacher).digest()
