"""What ``topkd score`` is told, and what it reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, SecretStr, model_validator

from topkd.clients import ClientConfig
from topkd.compose.tables import ScoringDialect
from topkd.topk.errors import TopkdError

KEPT_REFUSALS = 1000  # of a report; all are counted


class ScoreConfig(BaseModel):
    """What ``topkd score`` is told.

    Attributes:
        data: JSONL, Parquet, a datasets folder, or a cache whose rollouts are to be scored.
        out: The cache.
        teachers: URLs of one teacher; several are replicas.
        model: Served name; None takes the server's only one.
        dialect: How the server speaks.
        api_key: Sent with every request.
        k: Entries of each row.
        tokenizer: Folder or id of the tokenizer for rows of text.
        revision: Fingerprint of the teacher's weights; part of every key.
        teacher_id: Score the rows of this teacher_id; a row of another one is refused.
        limit: Rows at most.
        shard: (i, n): of n parts the i-th, from 1.
        dedupe: Skip sequences that came before (16 bytes of memory each), across shards too.
        max_tokens: Stop before more tokens than this are sent.
        max_cost: Stop before more than this is spent, at ``price_per_million``.
        price_per_million: Price of a million tokens sent.
        estimate: Count and forecast; ask nothing.
        strict: The first bad row ends the job.
        codec: How records are written.
        in_flight: Requests at once, over all replicas (the client's own window may keep it lower).
        client: Time-outs, retries and bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path
    out: Path
    teachers: Annotated[tuple[str, ...], Field(min_length=1)]
    model: str | None = None
    dialect: ScoringDialect = "auto"
    api_key: SecretStr | None = None
    k: PositiveInt = 20
    tokenizer: str | None = None
    revision: str = ""
    teacher_id: str = ""
    limit: PositiveInt | None = None
    shard: tuple[PositiveInt, PositiveInt] = (1, 1)
    dedupe: bool = False
    max_tokens: PositiveInt | None = None
    max_cost: PositiveFloat | None = None
    price_per_million: PositiveFloat | None = None
    estimate: bool = False
    strict: bool = False
    codec: Literal["packed", "raw", "cold"] = "packed"
    in_flight: PositiveInt = 128
    client: ClientConfig = ClientConfig()

    @model_validator(mode="after")
    def _consistent(self) -> ScoreConfig:
        if self.shard[0] > self.shard[1]:
            raise ValueError(f"there is no shard {self.shard[0]} of {self.shard[1]}")
        if self.max_cost is not None and self.price_per_million is None:
            raise ValueError("max_cost needs price_per_million")
        return self


@dataclass(slots=True)
class ScoreReport:
    """What became of the rows.

    ``tokens_sent`` counts each sequence once plus the one token that a scoring request generates; what a retry sends
    again is not in it. ``saved_tokens`` are those that the cache answered for. ``refusals`` holds the first 1,000.
    """

    out: str
    teacher: str = ""
    k: int = 0
    rows: int = 0
    scored: int = 0
    cached: int = 0
    duplicates: int = 0
    refused: int = 0
    failed: int = 0
    tokens_sent: int = 0
    saved_tokens: int = 0
    positions: int = 0
    cost: float | None = None
    estimate: bool = False
    stopped: str = ""
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    client: dict[str, float] = field(default_factory=dict)

    def blame(self, number: int, error: TopkdError) -> None:
        """Remember why a row was not scored."""
        self.reasons[error.what] += 1
        if len(self.refusals) < KEPT_REFUSALS:
            self.refusals.append({"row": number, "reason": str(error)})

    @property
    def complete(self) -> bool:
        """Every row was scored, cached or refused for what it is."""
        return not self.failed and not self.stopped

    def as_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {**asdict(self), "reasons": dict(self.reasons), "complete": self.complete}
