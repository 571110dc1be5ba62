"""Which rows of a data file are this job's, and how much they may cost."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
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
    """The rows within the limit that fall to this shard, duplicates left out when that is wished.

    Shards are cut by row number; with ``dedupe`` by content, so that equal rows meet in one shard.

    Args:
        config: What was asked.
        tokenizer: For rows of text.
        portion: Only these rows of the data.
    """

    def __init__(self, config: ScoreConfig, tokenizer: Any, portion: RowChunk | None = None) -> None:
        self.config, self.tokenizer, self.portion = config, tokenizer, portion
        self.duplicates = self.skipped = 0
        self._teachers = config.asked()
        self._sizes = {name: _vocabulary(asked) for name, asked in self._teachers.items()}

    def __iter__(self) -> Iterator[Item]:
        config, seen = self.config, set[bytes]()
        self.duplicates = self.skipped = 0
        shard, shards = config.shard
        rows = read_sequences(config.data, self.tokenizer, self.portion)
        first = 0 if self.portion is None else self.portion.first
        limit = config.limit if self.portion is None else None  # portions were cut within it
        for place, item in enumerate(islice(rows, limit), first):
            digest = digest_of(item) if config.dedupe and isinstance(item, ScoreInput) else None
            mine = place if digest is None else int.from_bytes(digest[:8], "little")
            if mine % shards != shard - 1:
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
                yield self._unmapped(item)
            else:
                yield self._within_vocabulary(item) if isinstance(item, ScoreInput) else item

    def forecast(self) -> int:
        """About how many rows there are; 0 when that is not known."""
        rows = count_rows(self.config.data)
        rows = rows if self.config.limit is None else min(rows, self.config.limit)
        return -(-rows // self.config.shard[1])

    @property
    def unbounded(self) -> bool:
        """Whether a teacher's vocabulary is not known, so that no id can be told to be outside."""
        return None in self._sizes.values()

    def _within_vocabulary(self, item: ScoreInput) -> Item:
        """The row, or why its teacher cannot be asked about it."""
        size, top = self._sizes[item.teacher_id], int(item.ids.max(initial=0))
        if size is None or top < size:
            return item
        return BadRow(item.number, DataError(
            "a row has an id outside the teacher's vocabulary", where=f"{self.config.data}:{item.number}", got=top,
            expected=f"below {size}",
        ))  # fmt: skip

    def _unmapped(self, item: ScoreInput) -> BadRow:
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


def _vocabulary(asked: TeacherAddress) -> int | None:
    """Ids that a teacher has: as it was told, or as the config of a model that is to be loaded here says."""
    if asked.vocab_size is not None or not asked.urls[0].startswith(IN_PROCESS):
        return asked.vocab_size
    try:
        config = json.loads((Path(asked.urls[0].removeprefix(IN_PROCESS)) / "config.json").read_text(encoding="utf-8"))
        size = config.get("text_config", config).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None  # loading it says what is wrong with it
    return size if isinstance(size, int) and size > 0 else None


class Claim(Enum):
    """What a row may do."""

    ASK = "ask"
    ELSEWHERE = "elsewhere"  # an equal row is being asked by another worker
    CAP = "cap"


class SpendingLimit:
    """Tokens that may still be sent. What was taken is never given back: a failed request may have been billed."""

    def __init__(self, config: ScoreConfig) -> None:
        caps: list[tuple[int, str]] = []
        if config.max_tokens is not None:
            caps.append((config.max_tokens, f"max_tokens = {config.max_tokens}"))
        if config.max_cost is not None and config.price_per_million is not None:
            tokens = int(min(config.max_cost / config.price_per_million * 1e6, sys.maxsize))
            caps.append((tokens, f"max_cost = {config.max_cost:g} ({tokens} tokens)"))
        self.left: int | None
        self.left, self.reached = min(caps) if caps else (None, "")

    def take(self, tokens: int) -> bool:
        """Reserve tokens; False, and nothing reserved, when they do not fit."""
        if self.left is None:
            return True
        if tokens > self.left:
            self.left = 0  # what comes after the first that does not fit is not asked either
            return False
        self.left -= tokens
        return True

    async def claim(self, wanted: Sequence[tuple[bytes, int]]) -> list[Claim]:
        """A verdict for each row, by its digest and the tokens it would send."""
        return [Claim.ASK if self.take(tokens) else Claim.CAP for _, tokens in wanted]


def digest_of(item: ScoreInput) -> bytes:
    """16 bytes that equal sequences with an equal start for one teacher share."""
    start = item.start.to_bytes(8, "little")
    teacher = hashlib.blake2b(item.teacher_id.encode()).digest() if item.teacher_id else b""
    return hashlib.blake2b(item.ids.tobytes(), digest_size=16, salt=start, key=teacher).digest()
