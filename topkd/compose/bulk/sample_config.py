"""The config and the report of ``topkd sample``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, SecretStr, model_validator

from topkd.clients import ClientConfig
from topkd.compose.bulk.report import Cost, InFlight, JobReport, Price, Rows
from topkd.compose.bulk.spending import Cap
from topkd.compose.config.tables import SamplingDialect


class SampleConfig(BaseModel):
    """The config of ``topkd sample``.

    Completions are drawn from the teacher's own distribution (temperature 1, nothing truncated): only so is the
    logprob that comes with a token the one it was drawn with.

    Attributes:
        data: JSONL, Parquet or a datasets folder of prompts.
        out: The cache.
        teacher: URL.
        model: Served name; None takes the server's only one.
        dialect: "openai" is chat completions, for servers that only sample; the others continue ids.
        api_key: Sent with every request.
        tokenizer: Folder or id of the served model's tokenizer.
        k: Entries of each position.
        n: Completions of each prompt.
        max_new_tokens: Of one completion.
        seed: Another one draws other completions.
        revision: Fingerprint of the teacher's weights; part of every key.
        limit: Rows at most.
        max_tokens: Stop before more tokens than this (prompts and completions) are paid for.
        max_cost: Stop before more than this is spent, at the two prices.
        price_in: Price of a million prompt tokens.
        price_out: Price of a million sampled tokens.
        estimate: Count and forecast, completions at their full length; ask nothing.
        strict: The first bad row ends the job.
        codec: How records are written.
        in_flight: Requests at once.
        client: Time-outs, retries and bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path
    out: Path
    teacher: str
    model: str | None = None
    dialect: SamplingDialect = "auto"
    api_key: SecretStr | None = None
    tokenizer: str | None = None
    k: Annotated[int, Field(ge=0)] = 20
    n: PositiveInt = 1
    max_new_tokens: PositiveInt = 512
    seed: Annotated[int, Field(ge=0)] = 0
    revision: str = ""
    limit: Rows | None = None
    max_tokens: PositiveInt | None = None
    max_cost: Cost | None = None
    price_in: Price | None = None
    price_out: Price | None = None
    estimate: bool = False
    strict: bool = False
    codec: Literal["packed", "raw", "cold"] = "packed"
    in_flight: InFlight = 16
    client: ClientConfig = ClientConfig()

    @model_validator(mode="after")
    def _consistent(self) -> SampleConfig:
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("prompt and sampled tokens have a price each: give both")
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

    ``completions`` were kept; ``ambiguous_completions`` held bytes that name no single id and were dropped, paid for
    all the same (their length is not known, and counted as the longest). ``ambiguous_entries`` are places of lists that
    were cut off for the same reason, of ``listed_entries``.
    """

    sampled: int = 0
    completions: int = 0
    ambiguous_completions: int = 0
    ambiguous_entries: int = 0
    listed_entries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
