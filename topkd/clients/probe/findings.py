"""Results of a probe: one finding per question, the capabilities they add up to, and a verdict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warn", "fail", "info", "unknown"]
SampleTemp = Literal["raw", "temperature", "processed", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question.

    Attributes:
        key: Stable name for scripts.
        group: Heading it stands under.
        title: The question, in words.
        status: "fail" forbids teaching; "warn" is worth reading first; "unknown" could not be found out.
        value: The answer, short.
        detail: How it was seen, or what follows from it.
    """

    key: str
    group: str
    title: str
    status: Status
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an endpoint can do, seen in its replies.

    Attributes:
        score_k: Largest K of a scored prompt; None = cannot score, -1 = no limit found.
        sample_k: Likewise for sampled tokens; None = cannot sample with ids and logprobs.
        candidates: Schema in which chosen ids are scored; None = they are not.
        candidates_k: Largest number of ids per position.
        suffix_scoring: Rows before ``start`` are neither computed for us nor sent.
        prefix_cached_scoring: A shared prefix is computed once.
        ids: How tokens are named in replies.
        score_temp: "none": scores are of the untempered distribution, as they must be.
        sample_temp: What sampled logprobs are of: the untempered distribution, the tempered one, or what was sampled
            from (temperature and truncation).
        vocab_size: Rows of the model's output layer, padding included; None when the server gives no clue.
        max_model_len: Prompt plus completion; None when the server does not say.
        sync: Ways in which new weights can be brought to the server.
        version: What the server calls itself.
        evidence: "probed" when seen in replies, "declared" when only read in documents.
    """

    score_k: int | None = None
    sample_k: int | None = None
    candidates: Literal["rows", "shared"] | None = None
    candidates_k: int = 0
    suffix_scoring: bool = False
    prefix_cached_scoring: bool = False
    ids: Literal["int", "token_id_str", "string"] = "int"
    score_temp: Literal["none", "unknown"] = "unknown"
    sample_temp: SampleTemp = "unknown"
    vocab_size: int | None = None
    max_model_len: int | None = None
    sync: tuple[str, ...] = ()
    version: str = ""
    evidence: Literal["probed", "declared"] = "probed"


@dataclass(frozen=True, slots=True)
class LoadLevel:
    """Scoring at one concurrency."""

    concurrency: int
    requests: int
    failed: int
    tokens_per_s: float
    p50_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """Scoring under rising concurrency, and what it means for a run.

    Attributes:
        prompt_tokens: Tokens of each request.
        k: K of each request.
        levels: In the order measured.
        best: Concurrency from which more no longer helped.
        tokens_per_s: There.
        batch: Sequences of one training step in the forecast.
        steps_per_hour: If scoring alone limits the run.
        saturated: False when the measurement ended before the server did.
    """

    prompt_tokens: int
    k: int
    levels: tuple[LoadLevel, ...]
    best: int
    tokens_per_s: float
    batch: int
    steps_per_hour: float
    saturated: bool


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Everything a probe found about one endpoint."""

    url: str
    model: str
    dialect: str
    can_teach: bool
    verdict: str
    capabilities: Capabilities
    findings: tuple[Finding, ...]
    requests: int
    seconds: float
    load: Load | None = None
    advice: tuple[str, ...] = field(default=())

    def __getitem__(self, key: str) -> Finding:
        """Return the finding of that key."""
        return {finding.key: finding for finding in self.findings}[key]

    def as_json(self) -> dict[str, Any]:
        """Convert to plain values for ``json.dumps``."""
        return dataclasses.asdict(self)


def state_probe_verdict(capabilities: Capabilities, findings: tuple[Finding, ...]) -> tuple[bool, str]:
    """Decide whether the endpoint can teach, and state it in one line."""
    failed = [finding for finding in findings if finding.status == "fail"]
    if failed:
        return False, f"cannot teach: {failed[0].detail or failed[0].value}"
    if capabilities.score_k is None:
        return False, "cannot teach: it was not seen to score a prompt"
    limit = "any K" if capabilities.score_k < 0 else f"K <= {capabilities.score_k}"
    extra = f"; scores candidates ({capabilities.candidates})" if capabilities.candidates else ""
    warned = sum(finding.status == "warn" for finding in findings)
    warning = f"; {warned} warning{'s' if warned > 1 else ''} above" if warned else ""
    return True, f"can teach: {limit}{extra}{warning}"
