"""The configs and reports of the bulk jobs, ``topkd score`` and ``topkd sample``."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, SecretStr, model_validator

from topkd.clients import ClientConfig
from topkd.compose.config.tables import SamplingDialect, ScoringDialect
from topkd.compose.teachers.served import IN_PROCESS
from topkd.topk.errors import TopkdError

Price: TypeAlias = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Cost: TypeAlias = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Rows: TypeAlias = Annotated[int, Field(gt=0, le=sys.maxsize)]
InFlight: TypeAlias = Annotated[int, Field(gt=0, le=10_000)]  # each is a task and, while it waits, a connection

KEPT_REFUSALS = 1000  # refusals that a report lists; further ones are only counted


@dataclass(frozen=True, slots=True)
class Cap:
    """An upper limit on what a job uses.

    Attributes:
        name: Name in reports.
        amount: The limit.
        prompt_price: Amount that a prompt token uses.
        completion_price: Amount that a sampled token uses.
    """

    name: str
    amount: float
    prompt_price: float = 1
    completion_price: float = 1


@dataclass(slots=True)
class JobReport:
    """The outcome of a job's rows; ``refusals`` has the first 1,000 rows that were refused or failed."""

    out: str
    teacher: str = ""
    k: int = 0
    rows: int = 0
    cached: int = 0
    refused: int = 0
    failed: int = 0
    cost: float | None = None
    estimate: bool = False
    stopped: str = ""
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    client: dict[str, float] = field(default_factory=dict)

    def add_failure(self, number: int, error: TopkdError) -> None:
        """Record why a row is not in the cache."""
        self.reasons[error.what] += 1
        if len(self.refusals) < KEPT_REFUSALS:
            self.refusals.append({"row": number, "reason": str(error)})

    def format_failures(self) -> str:
        """Format the counts of cached, refused and failed rows that are not zero, for a progress line."""
        counts = ((self.cached, "cached"), (self.refused, "refused"), (self.failed, "failed"))
        return "".join(f"  {count} {name}" for count, name in counts if count)

    @property
    def complete(self) -> bool:
        """Return whether every valid row was requested and has a reply."""
        return not self.failed and not self.stopped

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return {**asdict(self), "reasons": dict(self.reasons), "complete": self.complete}


class JobConfig(BaseModel):
    """The settings that both jobs have.

    Attributes:
        data: JSONL, Parquet or a datasets folder; for ``score`` also a cache whose rollouts are to be scored.
        out: Folder of the cache.
        model: Name of the model on the server; None takes its only model.
        api_key: Sent with every request.
        tokenizer: Folder or id of that model's tokenizer, for rows of text.
        revision: Name for the version of the teacher's weights; part of every cache key.
        limit: Largest number of rows.
        max_tokens: Stop before more tokens than this are sent (``sample``: sent and sampled).
        max_cost: Stop before more than this is spent, at the job's prices.
        estimate: Only estimate tokens and cost, with completions of full length; score or sample nothing.
        strict: Whether the first bad row ends the job.
        codec: Codec of the cache's records.
        client: Time-outs, retries and bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path
    out: Path
    model: str | None = None
    api_key: SecretStr | None = None
    tokenizer: str | None = None
    revision: str = ""
    limit: Rows | None = None
    max_tokens: PositiveInt | None = None
    max_cost: Cost | None = None
    estimate: bool = False
    strict: bool = False
    codec: Literal["packed", "raw", "cold"] = "packed"
    client: ClientConfig = ClientConfig()


class ScoreConfig(JobConfig):
    """The config of ``topkd score``.

    Attributes:
        teachers: URLs of one teacher; several are replicas. "vllm:FOLDER" loads it in this process (Ray: each worker).
        routes: Instead of ``teachers``: the URLs of each teacher, by the teacher_id of its rows.
        engine: Further arguments of ``vllm.LLM`` for a teacher in this process.
        models: With ``routes``: model names by teacher_id, for servers with several models.
        dialect: API of the server.
        k: Entries of each top-K list.
        revisions: With ``routes``: ``revision`` by teacher_id.
        vocab_size: Number of the teacher's ids: a reply with an id outside them is an error. None allows every id.
        vocab_sizes: With ``routes``: ``vocab_size`` by teacher_id.
        teacher_id: With ``teachers``: score only the rows with this teacher_id, and skip the others. Without it, a row
            that names a teacher is refused. With ``routes``, a row whose teacher has no URL is refused.
        shard: (i, n): score the i-th of n parts of the rows, from 1.
        dedupe: Skip sequences that are equal to an earlier one, also across shards (16 bytes of memory each).
        price_per_million: Price of a million tokens sent.
        in_flight: Largest number of requests at once, over all replicas (the client may allow fewer).
        runner: "local" is this process; "ray" distributes the rows to workers on a Ray cluster.
        workers: Number of workers of a Ray job; ``in_flight`` is divided among them.
        gpus_per_worker: GPUs of each worker of a Ray job, for a teacher in its process.
        ray_address: Cluster to join; None takes RAY_ADDRESS, or starts one on this machine for the job.
    """

    teachers: tuple[str, ...] = ()
    routes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)
    models: dict[str, str] = Field(default_factory=dict)
    dialect: ScoringDialect = "auto"
    k: PositiveInt = 20
    revisions: dict[str, str] = Field(default_factory=dict)
    vocab_size: PositiveInt | None = None
    vocab_sizes: dict[str, PositiveInt] = Field(default_factory=dict)
    teacher_id: str = ""
    shard: tuple[PositiveInt, PositiveInt] = (1, 1)
    dedupe: bool = False
    price_per_million: Cost | None = None
    in_flight: InFlight = 128
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
            raise ValueError("teacher_id is for the URLs of one teacher: routes scores the rows of all of them")
        urls = [*self.teachers, *(url for replicas in self.routes.values() for url in replicas)]
        if self.engine and not any(url.startswith(IN_PROCESS) for url in urls):
            raise ValueError(
                f"engine settings are for a teacher that is loaded here ({IN_PROCESS}FOLDER), not for a server"
            )
        if self.runner != "ray" and (self.ray_address is not None or self.gpus_per_worker):
            raise ValueError("ray_address and gpus_per_worker need runner = ray")
        for named in (self.models, self.revisions, self.vocab_sizes):
            if strange := sorted(set(named) - set(self.routes)):
                raise ValueError(f"there is a model, revision or vocabulary size for {strange}, which has no URL")
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
    """One teacher of the config: URLs of its replicas, model name, revision and vocabulary size."""

    urls: tuple[str, ...]
    model: str | None
    revision: str
    vocab_size: int | None = None


@dataclass(slots=True)
class ScoreReport(JobReport):
    """The outcome of a score job's rows.

    ``tokens_sent`` counts each sequence once, plus the one token that a scoring request generates; retries are not
    counted. ``saved_tokens`` would have been sent without the cache. ``skipped`` rows are for a teacher that is
    not in this job. An estimate also has the ``largest_id`` of its rows. ``unbounded`` means that a teacher's
    vocabulary size is not known, so that this id may still be refused.
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


class SampleConfig(JobConfig):
    """The config of ``topkd sample``.

    Completions are sampled at temperature 1 and without truncation: only then is the logprob in the reply the
    one that the token was sampled with.

    Attributes:
        teacher: URL of the server.
        dialect: "openai" means chat completions, for servers that only sample; the other dialects accept token ids.
        k: Entries of each top-K list.
        n: Completions of each prompt.
        max_new_tokens: Largest number of tokens of a completion.
        seed: Seed of the sampling.
        price_in: Price of a million prompt tokens.
        price_out: Price of a million sampled tokens.
        in_flight: Largest number of requests at once.
    """

    teacher: str
    dialect: SamplingDialect = "auto"
    k: Annotated[int, Field(ge=0)] = 20
    n: PositiveInt = 1
    max_new_tokens: PositiveInt = 512
    seed: Annotated[int, Field(ge=0)] = 0
    price_in: Price | None = None
    price_out: Price | None = None
    in_flight: InFlight = 16

    @model_validator(mode="after")
    def _consistent(self) -> SampleConfig:
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in and price_out must be given together")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError("max_cost needs price_in and price_out")
        return self

    def caps(self) -> list[Cap]:
        """Return the job's caps."""
        caps: list[Cap] = []
        if self.max_tokens is not None:
            caps.append(Cap(f"max_tokens = {self.max_tokens}", self.max_tokens))
        if self.max_cost is not None and self.price_in is not None and self.price_out is not None:
            caps.append(Cap(f"max_cost = {self.max_cost:g}", self.max_cost * 1e6, self.price_in, self.price_out))
        return caps

    def cost(self, prompt: int, completion: int) -> float | None:
        """Compute what these tokens cost; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt * self.price_in + completion * self.price_out) / 1e6


@dataclass(slots=True)
class SampleReport(JobReport):
    """The outcome of a sample job's prompts.

    ``completions`` were kept. ``ambiguous_completions`` were dropped, because they have bytes that no single id stands
    for; they count as paid, with the largest length, because theirs is not known. ``ambiguous_entries`` of the
    ``listed_entries`` were removed from top-K lists for the same reason.
    """

    sampled: int = 0
    completions: int = 0
    ambiguous_completions: int = 0
    ambiguous_entries: int = 0
    listed_entries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
