"""Protocols: what one room needs of another.

``compose`` plugs the pieces together. A live, a cached and a replayed teacher are the same type to the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Float32, Int32, TopK

Ids: TypeAlias = Int32 | Sequence[int]
Version: TypeAlias = str


@runtime_checkable
class TeacherScorer(Protocol):
    """Scores a given token sequence."""

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Score rows ``start .. len(ids) - 2``: R = len(ids) - 1 - start rows, row i predicting ``ids[start + i + 1]``.

        ``actual_ids`` equals ``ids[start + 1:]`` and ``actual_logp`` is exact; anything else is an error, not a row.
        """
        ...


@runtime_checkable
class CandidateScorer(Protocol):
    """Scores chosen ids at every position (a teacher at the student's own top-K, say)."""

    async def score_candidates(self, ids: Ids, start: int, candidates: Int32) -> Float32:
        """Return float32 [R, K] logprobs of ``candidates`` [R, K] (-1 pads give -inf); rows as in ``score``."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Draws completions from the student."""

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Draw n rollouts with exact sampled-token logprobs; with k > 0 also the sampler's top-K rows."""
        ...


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """New student weights, as a server can fetch them: a LoRA adapter folder or a full checkpoint folder."""

    kind: Literal["lora", "full"]
    path: str
    version: Version


@runtime_checkable
class WeightSink(Protocol):
    """Brings new weights to where sampling happens."""

    async def push(self, update: WeightUpdate) -> Version:
        """Send new weights; return the version that the sink confirms, or raise SyncError."""
        ...
