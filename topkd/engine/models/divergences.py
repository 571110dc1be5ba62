"""Exact divergences between two local models on fixed sequences: the whole vocabulary, no estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from topkd.engine.models.student import Student, pad_sequences
from topkd.topk.errors import AlignmentError, ConfigError
from topkd.topk.types import Int32

_AT_ONCE = 16  # sequences
_ROWS_AT_ONCE = 2048  # bounds the [rows, V] float64 temporaries


@dataclass(frozen=True, slots=True)
class Probe:
    """A sequence whose positions from ``prompt_len`` on are compared.

    Attributes:
        ids: int32 [T], prompt and continuation.
        prompt_len: Number of prompt tokens.
        teacher_prompt: int32 [P'], what the teacher sees in the prompt's place; None: the same.
    """

    ids: Int32
    prompt_len: int
    teacher_prompt: Int32 | None = None

    def as_seen_by_teacher(self) -> Probe:
        """Return the same continuation after the teacher's prompt."""
        if self.teacher_prompt is None:
            return self
        return Probe(np.concatenate([self.teacher_prompt, self.ids[self.prompt_len :]]), self.teacher_prompt.size)


@torch.inference_mode()
def exact_divergences(student: Student, teacher: Student, probes: Sequence[Probe]) -> dict[str, float]:
    """Measure mean KL(S||T), KL(T||S) and JSD in nats, and how often both models rank the same token first.

    Float64 over the full vocabulary, from each model's own float32 logits.
    """
    if not probes:
        raise ConfigError("no sequences to evaluate on")
    if student.vocab_size != teacher.vocab_size:
        raise AlignmentError("the vocabularies differ in size", got=student.vocab_size, expected=teacher.vocab_size)
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    ordered = sorted(probes, key=lambda probe: probe.ids.size)
    for begin in range(0, len(ordered), _AT_ONCE):
        batch = ordered[begin : begin + _AT_ONCE]
        rows = _rows(batch)
        seen = [probe.as_seen_by_teacher() for probe in batch]
        student_logits = student.logit_rows(*_pad(batch, student.device), rows.to(student.device))
        teacher_logits = teacher.logit_rows(*_pad(seen, teacher.device), _rows(seen).to(teacher.device))
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            sums += _sum_divergences(student_logits[part].cpu(), teacher_logits[part].cpu())
        count += len(rows)
    reverse, forward, jsd, agree = (sums / count).tolist()
    return {"reverse_kl": reverse, "forward_kl": forward, "jsd": jsd, "agreement": agree, "eval_tokens": count}


def _sum_divergences(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    s = torch.log_softmax(student_logits.double(), dim=-1)
    t = torch.log_softmax(teacher_logits.double(), dim=-1)
    m = torch.logaddexp(s, t) - np.log(2.0)
    return torch.stack(
        [
            _weighted_difference(s, t),
            _weighted_difference(t, s),
            0.5 * _weighted_difference(s, m) + 0.5 * _weighted_difference(t, m),
            (s.argmax(-1) == t.argmax(-1)).double().sum(),
        ]
    )


def _weighted_difference(first: Tensor, second: Tensor) -> Tensor:
    """Compute sum exp(a) (a - b), where a = -inf (an id that a model excludes) contributes exactly 0."""
    terms = first.exp() * (first - second)
    return torch.where(torch.isneginf(first), 0.0, terms).sum()  # where() is several times cheaper than indexing


def _rows(batch: Sequence[Probe]) -> Tensor:
    width = max(probe.ids.size for probe in batch) - 1
    rows = [b * width + np.arange(probe.prompt_len - 1, probe.ids.size - 1) for b, probe in enumerate(batch)]
    return torch.from_numpy(np.concatenate(rows))


def _pad(batch: Sequence[Probe], device: torch.device) -> tuple[Tensor, Tensor]:
    return pad_sequences([probe.ids[:-1] for probe in batch], device)
