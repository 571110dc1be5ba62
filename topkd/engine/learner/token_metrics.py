"""A step's token statistics for the run log; docs/run-log.md defines each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkd.engine.config.learner import ImportanceSampling
from topkd.engine.learner.objectives import TokenStats
from topkd.topk import entropy_bounds, kl_k1, kl_k3
from topkd.topk.samples import PreparedSample, TopKBehavior, TopKPreparedSample
from topkd.topk.types import Float64

RATIO_EDGES = [float(2.0 ** (i / 2)) for i in range(-8, 9)]  # 1/16 .. 16, two bins an octave; the outermost are open


def token_metrics(stats: Sequence[TokenStats], importance: ImportanceSampling) -> dict[str, Any]:
    """Compute KLs, advantages, ratios and coefficients over a step's trained tokens.

    Tokens that the teacher excludes (log t = -inf) have no finite estimate of a KL: they are left out of both estimates
    and counted in ``teacher_zero_tokens``. Tokens without a behaviour logprob (completions from the data) have no ratio
    and do not enter the KLs.
    """
    new, behavior, teacher = (
        np.concatenate([getattr(part, name) for part in stats]).astype(np.float64)
        for name in ("logp_new", "logp_behavior", "logp_teacher")
    )
    known, sampled = np.isfinite(teacher), ~np.isnan(behavior)
    metrics: dict[str, Any] = {"teacher_zero_tokens": int(np.isneginf(teacher).sum())}
    if sampled.any():  # only tokens that a policy sampled can estimate its KL
        metrics |= {
            "kl_k1": _mean(np.asarray(kl_k1(teacher, new))[known & sampled]),
            "kl_k3": _mean(np.asarray(kl_k3(teacher, new))[known & sampled]),
        }
    parts = [part.advantage for part in stats if part.advantage is not None]
    advantage = np.concatenate(parts) if len(parts) == len(stats) else None
    if advantage is not None:
        finite = advantage[np.isfinite(advantage)]  # at beta = 1 a token of teacher probability zero is infinite
        metrics |= {
            "advantage_mean": _mean(finite),
            "advantage_std": float(finite.std()) if finite.size else math.nan,
            "advantage_abs_mean": _mean(np.abs(finite)),
        }
    metrics |= _ratio_metrics(new, behavior, advantage, importance)
    coefficient = np.concatenate([value for part in stats for value in part.coefficient] or [np.zeros(0)])
    if coefficient.size == new.size:
        plain = np.abs(teacher - new)[known].sum()
        metrics["effective_coefficient"] = float(coefficient[known].sum() / plain) if plain > 0 else math.nan
    stops = [part.stop_p for part in stats if part.stop_p is not None]
    if stops:
        metrics["eos_probability"] = _mean(np.concatenate(stops))
    return metrics | _combine_counts(stats)


def average_passes(passes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the records of several optimiser steps on the same tokens.

    ``ratio_max`` is their maximum and ``ratio_hist`` their sum: every token counts once per pass.
    """
    if len(passes) == 1:
        return dict(passes[0])
    averages: dict[str, Any] = {}
    for name, first in passes[0].items():
        values = [metrics[name] for metrics in passes if name in metrics]
        if name == "ratio_hist":
            averages[name] = np.sum(values, axis=0).tolist()
        elif name == "ratio_max":
            averages[name] = max(values)
        elif all(value == first for value in values):
            averages[name] = first
        else:
            averages[name] = _mean(np.array([value for value in values if not math.isnan(value)]))
    return averages


def _ratio_metrics(
    new: Float64, behavior: Float64, advantage: Float64 | None, importance: ImportanceSampling
) -> dict[str, Any]:
    sampled = ~np.isnan(behavior)
    if not sampled.any():
        return {}
    ratio = np.exp(np.clip(new[sampled] - behavior[sampled], -20.0, 20.0))
    bounded = np.zeros(ratio.shape, dtype=np.bool_)
    if importance.kind == "truncated":
        bounded = ratio > importance.cap
    elif importance.kind == "ppo" and advantage is not None:
        up = advantage[sampled] >= 0
        dual = importance.dual_clip or math.inf
        bounded = np.where(up, ratio > 1 + importance.clip, (ratio < 1 - importance.clip) | (ratio > dual))
    inside = np.clip(ratio, RATIO_EDGES[0], RATIO_EDGES[-1])
    return {
        "ratio_mean": float(ratio.mean()),
        "ratio_max": float(ratio.max()),
        "ratio_hist": np.histogram(inside, RATIO_EDGES)[0].tolist(),
        "ratio_hist_edges": RATIO_EDGES,
        "clip_fraction": float(bounded.mean()),
        "ess": float(ratio.sum() ** 2 / np.square(ratio).sum() / ratio.size),
        "behavior_kl_k3": float(np.asarray(kl_k3(new[sampled], behavior[sampled])).mean()),
    }


def _combine_counts(stats: Sequence[TokenStats]) -> dict[str, float]:
    """Combine the objective's own counts (summed) and means (weighted by tokens)."""
    tokens = sum(part.logp_new.size for part in stats)
    counts = {name: sum(part.counts[name] for part in stats) for name in stats[0].counts}
    means = {
        name: sum(part.means[name] * part.logp_new.size for part in stats) / tokens
        for name in stats[0].means
        if all(name in part.means for part in stats)
    }
    return counts | means


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """Statistics of one rank's samples before the step; ``batch_metrics`` combines those of all ranks.

    Attributes:
        lengths: Completion tokens of each sample.
        missing: Number of tokens to train without a teacher signal.
        wanted: Number of tokens to train.
        entropy_lo: Lower bound of the teacher's entropy of each row, nats; NaN = no signal.
        entropy_hi: Upper bound.
        overlap: For each row with both lists, the share of the teacher's ids that the sampling student listed too.
    """

    lengths: list[int]
    missing: int
    wanted: int
    entropy_lo: Float64
    entropy_hi: Float64
    overlap: Float64


def sample_facts(samples: Sequence[PreparedSample], vocab_size: int) -> SampleFacts:
    """Collect the statistics of one rank's samples."""
    missing = wanted = 0
    lows, highs, shares = ([np.zeros(0)] for _ in range(3))
    for sample in samples:
        unknown = np.isnan(sample.teacher_logp)
        if isinstance(sample, TopKPreparedSample):
            unknown = unknown | ~sample.teacher.signal
            top = int(sample.teacher.ids.max(initial=-1)) + 1
            low, high = entropy_bounds(sample.teacher, max(vocab_size, top))
            lows.append(low)
            highs.append(high)
            if isinstance(sample.behavior, TopKBehavior):
                own = sample.behavior.topk.ids  # in a union the teacher's own K are the most probable ones
                shares.append(_overlap(sample.teacher.ids[:, : own.shape[1]], own))
        missing += int((unknown & sample.core.mask).sum())
        wanted += int(sample.core.mask.sum())
    return SampleFacts(
        [sample.core.completion_len for sample in samples],
        missing,
        wanted,
        np.concatenate(lows),
        np.concatenate(highs),
        np.concatenate(shares),
    )


def batch_metrics(facts: Sequence[SampleFacts]) -> dict[str, float]:
    """Compute ``length_mean``, ``missing_mass``, ``entropy_lo``, ``entropy_hi`` and ``topk_overlap`` where known."""
    lengths = [length for part in facts for length in part.lengths]
    if not lengths:
        return {}
    metrics = {"length_mean": float(np.mean(lengths))}
    if wanted := sum(part.wanted for part in facts):
        metrics["missing_mass"] = sum(part.missing for part in facts) / wanted
    for name, source in (("entropy_lo", "entropy_lo"), ("entropy_hi", "entropy_hi"), ("topk_overlap", "overlap")):
        values = np.concatenate([getattr(part, source) for part in facts])
        values = values[~np.isnan(values)]
        if values.size:
            metrics[name] = float(values.mean())
    return metrics


def _overlap(teacher: NDArray[np.int32], student: NDArray[np.int32]) -> NDArray[np.float64]:
    listed = teacher >= 0
    both = ((teacher[:, :, None] == student[:, None, :]) & listed[:, :, None]).any(-1).sum(1)
    count = listed.sum(1)
    return np.where(count > 0, both / np.maximum(count, 1), np.nan)


def _mean(values: Float64) -> float:
    return float(values.mean()) if values.size else math.nan


class GradientNoise:
    """How noisy a step's gradient is, from its norm after half of the micro-batches and after all of them.

    With n and N tokens and mean gradients g and G: |grad|^2 = (N |G|^2 - n |g|^2) / (N - n) and the noise of one token
    tr = (|g|^2 - |G|^2) / (1/n - 1/N), both unbiased if tokens are drawn alike (arXiv:1812.06162). Their ratio is the
    batch size, in tokens, at which noise and signal are equal: average both over steps before dividing.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._tokens = 0
        self._square = 0.0

    def small(self, parameters: Sequence[Tensor], tokens: int) -> None:
        """Record the gradients' norm after ``tokens`` tokens."""
        norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
        if tokens and norms:
            self._tokens = tokens
            self._square = float(torch.stack(norms).square().sum()) * (self.num_tokens / tokens) ** 2

    def metrics(self, norm: float) -> dict[str, float]:
        """Compute ``grad_noise`` (in tokens) and its two parts; nothing without two micro-batches."""
        n, total = self._tokens, self.num_tokens
        if not 0 < n < total or not math.isfinite(norm):
            return {}
        signal = (total * norm**2 - n * self._square) / (total - n)
        trace = (self._square - norm**2) / (1 / n - 1 / total)
        ratio = trace / signal if signal > 0 and trace >= 0 else math.nan
        return {"grad_noise": ratio, "grad_noise_trace": trace, "grad_signal": signal}
