"""Protocols: what one room needs from another.

``compose`` connects the rooms. For the engine, a live, a cached and a replayed teacher have the same type.
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
    """Scores a token sequence."""

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Score rows ``start .. len(ids) - 2``: R = len(ids) - 1 - start rows; row i predicts ``ids[start + i + 1]``.

        ``actual_ids`` equals ``ids[start + 1:]`` and ``actual_logp`` is exact; otherwise the scorer raises an error.
        """
        ...


@runtime_checkable
class CandidateScorer(Protocol):
    """Scores chosen ids at every position (for example the student's top-K ids with a teacher)."""

    async def score_candidates(self, ids: Ids, start: int, candidates: Int32) -> Float32:
        """Return float32 [R, K] logprobs of ``candidates`` [R, K] (-1 pads give -inf); rows as in ``score``."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Samples completions from the student."""

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Sample n rollouts with exact sampled-token logprobs; with k > 0 also with the sampler's top-K lists."""
        ...


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """New student weights that a server can load: the folder of a LoRA adapter or of a full model."""

    kind: Literal["lora", "full"]
    path: str
    version: Version


@runtime_checkable
class WeightSink(Protocol):
    """Sends new weights to a sampler."""

    async def push(self, update: WeightUpdate) -> Version:
        """Send new weights; return the version that the sink confirms, or raise SyncError."""
        ...
