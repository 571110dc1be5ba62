"""Which rows of a data file are this job's, and how much they may cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from topkd.compose.score_config import ScoreConfig
from topkd.compose.sequences import BadRow, Item, ScoreInput, count_rows, read_sequences
from topkd.topk.errors import DataError


class Selection:
    """The rows within the limit that fall to this shard, duplicates left out when that is wished.

    Shards are cut by row number; with ``dedupe`` by content, so that equal rows meet in one shard.
    """

    def __init__(self, config: ScoreConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.duplicates = 0

    def __iter__(self) -> Iterator[Item]:
        config, seen = self.config, set[bytes]()
        self.duplicates = 0
        shard, shards = config.shard
        rows = islice(read_sequences(config.data, self.tokenizer), config.limit)
        for place, item in enumerate(rows):
            digest = digest_of(item) if config.dedupe and isinstance(item, ScoreInput) else None
            mine = place if digest is None else int.from_bytes(digest[:8], "little")
            if mine % shards != shard - 1:
                continue
            if digest is not None:
                if digest in seen:
                    self.duplicates += 1
                    continue
                seen.add(digest)
            yield self._for_this_teacher(item)

    def forecast(self) -> int:
        """About how many rows there are; 0 when that is not known."""
        rows = count_rows(self.config.data)
        rows = rows if self.config.limit is None else min(rows, self.config.limit)
        return -(-rows // self.config.shard[1])

    def _for_this_teacher(self, item: Item) -> Item:
        if isinstance(item, BadRow) or item.teacher_id == self.config.teacher_id:
            return item
        return BadRow(item.number, DataError(
            "a row is for another teacher", where=f"{self.config.data}:{item.number}", got=repr(item.teacher_id),
            expected=repr(self.config.teacher_id), hint="run once for each teacher, with --teacher-id",
        ))  # fmt: skip


class Budget:
    """Tokens that may still be sent. What was taken is never given back: a failed request may have been billed."""

    def __init__(self, config: ScoreConfig) -> None:
        caps: list[tuple[int, str]] = []
        if config.max_tokens is not None:
            caps.append((config.max_tokens, f"max_tokens = {config.max_tokens}"))
        if config.max_cost is not None and config.price_per_million is not None:
            tokens = int(config.max_cost / config.price_per_million * 1e6)
            caps.append((tokens, f"max_cost = {config.max_cost:g} ({tokens} tokens)"))
        self.left: int | None
        self.left, self.reached = min(caps) if caps else (None, "")

    def take(self, tokens: int) -> bool:
        """Reserve tokens; False, and nothing reserved, when they do not fit."""
        if self.left is None:
            return True
        if tokens > self.left:
            return False
        self.left -= tokens
        return True


def digest_of(item: ScoreInput) -> bytes:
    """16 bytes that equal sequences with an equal start share."""
    return hashlib.blake2b(item.ids.tobytes(), digest_size=16, salt=item.start.to_bytes(8, "little")).digest()
