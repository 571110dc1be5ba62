"""The config and the report of ``topkd score``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, SecretStr, model_validator

from topkd.clients import ClientConfig
from topkd.compose.bulk.report import KEPT_REFUSALS, Cost, InFlight, JobReport, Rows
from topkd.compose.bulk.spending import Cap
from topkd.compose.config.tables import ScoringDialect
from topkd.compose.teachers.served import IN_PROCESS


class ScoreConfig(BaseModel):
    """The config of ``topkd score``.

    Attributes:
        data: JSONL, Parquet, a datasets folder, or a cache whose rollouts are to be scored.
        out: The cache.
        teachers: URLs of one teacher; several are replicas. "vllm:FOLDER" loads it into this process (each worker's).
        routes: Instead of ``teachers``: for each teacher_id that rows may name, its URLs.
        engine: Further arguments of ``vllm.LLM`` for a teacher in this process.
        model: Served name; None takes the server's only one.
        models: With ``routes``: served names by teacher_id, where a server has several.
        dialect: How the server speaks.
        api_key: Sent with every request.
        k: Entries of each row.
        tokenizer: Folder or id of the tokenizer for rows of text.
        revision: Fingerprint of the teacher's weights; part of every key.
        revisions: With ``routes``: the same by teacher_id.
        vocab_size: A reply with an id at or past it is a fault; None takes every id.
        vocab_sizes: With ``routes``: the same by teacher_id.
        teacher_id: With ``teachers``: score the rows of this teacher_id and pass over the others. Left out, a row that
            names a teacher is refused, as is with ``routes`` a row of a teacher that has none.
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
        runner: "local" is this process; "ray" shares the rows out to workers on a Ray cluster.
        workers: Of a Ray job; ``in_flight`` is divided among them.
        gpus_per_worker: What each worker of a Ray job takes, for a teacher in its own process.
        ray_address: Cluster to join; None takes RAY_ADDRESS, or starts one on this machine for the job.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path
    out: Path
    teachers: tuple[str, ...] = ()
    routes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)
    model: str | None = None
    models: dict[str, str] = Field(default_factory=dict)
    dialect: ScoringDialect = "auto"
    api_key: SecretStr | None = None
    k: PositiveInt = 20
    tokenizer: str | None = None
    revision: str = ""
    revisions: dict[str, str] = Field(default_factory=dict)
    vocab_size: PositiveInt | None = None
    vocab_sizes: dict[str, PositiveInt] = Field(default_factory=dict)
    teacher_id: str = ""
    limit: Rows | None = None
    shard: tuple[PositiveInt, PositiveInt] = (1, 1)
    dedupe: bool = False
    max_tokens: PositiveInt | None = None
    max_cost: Cost | None = None
    price_per_million: Cost | None = None
    estimate: bool = False
    strict: bool = False
    codec: Literal["packed", "raw", "cold"] = "packed"
    in_flight: InFlight = 128
    client: ClientConfig = ClientConfig()
    runner: Literal["local", "ray"] = "local"
    workers: PositiveInt = 4
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    ray_address: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ScoreConfig:
        if self.shard[0] > self.shard[1]:
            raise ValueError(f"there is no shard {self.shard[0]} of {self.shard[1]}")
        if self.max_cost is not None and self.price_per_million is None:
            raise ValueError("max_cost needs price_per_million")
        if bool(self.teachers) == bool(self.routes):
            raise ValueError("give either the URLs of one teacher, or URLs for each teacher_id (at least 1)")
        if self.routes and self.teacher_id:
            raise ValueError("a job with a URL for each teacher_id scores the rows of all of them")
        urls = [*self.teachers, *(url for replicas in self.routes.values() for url in replicas)]
        if self.engine and not any(url.startswith(IN_PROCESS) for url in urls):
            raise ValueError(
                f"engine settings are for a teacher that is loaded here ({IN_PROCESS}FOLDER), not for a server"
            )
        if self.runner != "ray" and (self.ray_address is not None or self.gpus_per_worker):
            raise ValueError("ray_address and gpus_per_worker need runner = ray")
        for named in (self.models, self.revisions, self.vocab_sizes):
            if strange := sorted(set(named) - set(self.routes)):
                raise ValueError(f"a model, revision or vocabulary size for {strange}, which has no URL")
        return self

    def caps(self) -> list[Cap]:
        """Return the job's caps in tokens, the tightest first."""
        caps: list[Cap] = []
        if self.max_tokens is not None:
            caps.append(Cap(f"max_tokens = {self.max_tokens}", self.max_tokens))
        if self.max_cost is not None and self.price_per_million is not None:
            tokens = int(min(self.max_cost / self.price_per_million * 1e6, sys.maxsize))
            caps.append(Cap(f"max_cost = {self.max_cost:g} ({tokens} tokens)", tokens))
        return sorted(caps, key=lambda cap: (cap.amount, cap.name))

    def addresses(self) -> dict[str, TeacherAddress]:
        """Return the job's teachers by the teacher_id of their rows."""
        if self.teachers:
            return {self.teacher_id: TeacherAddress(self.teachers, self.model, self.revision, self.vocab_size)}
        return {
            name: TeacherAddress(
                urls,
                self.models.get(name, self.model),
                self.revisions.get(name, self.revision),
                self.vocab_sizes.get(name, self.vocab_size),
            )
            for name, urls in self.routes.items()
        }


@dataclass(frozen=True, slots=True)
class TeacherAddress:
    """One teacher as the config names it: URLs of its replicas, its served name, its revision, its size."""

    urls: tuple[str, ...]
    model: str | None
    revision: str
    vocab_size: int | None = None


@dataclass(slots=True)
class ScoreReport(JobReport):
    """The outcome of a score job's rows.

    ``tokens_sent`` counts each sequence once plus the one token that a scoring request generates; what a retry sends
    again is not in it. ``saved_tokens`` would have been sent without the cache. ``skipped`` rows are
    for a teacher that is not in this job. An estimate also has the ``largest_id`` of its rows, and whether
    the size of a teacher's vocabulary is not known (``unbounded``), so that such an id may yet be refused.
    """

    scored: int = 0
    duplicates: int = 0
    skipped: int = 0
    tokens_sent: int = 0
    saved_tokens: int = 0
    positions: int = 0
    largest_id: int = 0
    unbounded: bool = False

    def add(self, other: ScoreReport) -> None:
        """Add the counts of a part of the job, except cost and client counters, which belong to the whole."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons.update(other.reasons)
        self.refusals = sorted([*self.refusals, *other.refusals], key=lambda refusal: int(refusal["row"]))[
            :KEPT_REFUSALS
        ]
        self.stopped = self.stopped or other.stopped
        self.teacher = self.teacher or other.teacher


_COUNTS = (
    "rows", "scored", "cached", "duplicates", "skipped", "refused", "failed", "tokens_sent", "saved_tokens",
    "positions",
)  # fmt: skip
