"""Jobs for the model thread and their answers: plain values, no HTTP and no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class SamplingJob:
    """How completions are drawn. The defaults draw from the model's own distribution."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True  # leave them out of the text
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    detokenize: bool = True
    scaled_logprobs: bool = False  # of the distribution at this temperature, before truncation: SGLang's convention

    @property
    def greedy(self) -> bool:
        """Temperatures below 1e-5 are argmax, as in vLLM."""
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One prompt: score it, then draw ``n`` completions.

    Attributes:
        prompt_logprobs: K entries for every prompt row besides the realised token's; None scores nothing.
        candidates: int32 [len(ids) - 1 - start, C], -1 pads: ids to score at each row from ``start`` on.
        adapter: Name of a loaded LoRA adapter; None is the base model.
    """

    ids: tuple[int, ...]
    sampling: SamplingJob
    n: int = 1
    prompt_logprobs: int | None = None
    candidates: NDArray[np.int32] | None = None
    start: int = 0
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class PromptScores:
    """R = len(ids) - 1 rows; row i describes token i + 1 given the tokens before it."""

    ids: NDArray[np.int64]  # [R, K], by rank
    logp: NDArray[np.float32]  # [R, K]
    actual_logp: NDArray[np.float32]  # [R]
    actual_rank: NDArray[np.int64]  # [R], 1 is the likeliest


@dataclass(slots=True)
class Completion:
    """One drawn sequence. Row i of the lists belongs to ``token_ids[i]``."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "abort"
    stop_reason: int | str | None = None
    logp: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    top_ids: list[NDArray[np.int64]] = field(default_factory=list)
    top_logp: list[NDArray[np.float32]] = field(default_factory=list)
    top_rank: list[NDArray[np.int64]] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """Everything a job asked for."""

    completions: list[Completion]
    scores: PromptScores | None = None
    candidate_logp: NDArray[np.float32] | None = None  # [rows, C], -inf at pads
