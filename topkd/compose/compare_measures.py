"""What a comparison measures on the embedded pair: exact divergences on three kinds of prefix, and a task."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from topkd.engine.evaluation import Probe, exact_divergences
from topkd.engine.sampler import InProcessSampler
from topkd.engine.student import Student
from topkd.topk.samples import SamplingParams
from topkd.topk.types import Int32

PROMPT_TOKENS = 24
PROBE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Measures:
    """Called as an evaluation hook.

    The top level of its record is measured on *fixed* prefixes: held-out prompts continued by the untrained student,
    the same for every cell. ``fresh`` is on the present student's own continuations of the same prompts, ``teacher``
    on the teacher's. ``accuracy`` is how often the student's first choice is the next token of held-out text.
    """

    student: Student
    judge: Student
    prompts: list[Int32]
    fixed: list[Probe]
    taught: list[Probe]
    text: list[Probe]

    @classmethod
    async def prepared(cls, student: Student, judge: Student, held_out: NDArray[np.int32], probes: int) -> Measures:
        """Measures on ``probes`` held-out prompts, the same whatever the cell's seed."""
        starts = np.random.default_rng(0).integers(0, len(held_out) - PROMPT_TOKENS - PROBE_TOKENS, size=probes)
        prompts = [held_out[start : start + PROMPT_TOKENS] for start in starts]
        whole = [held_out[start : start + PROMPT_TOKENS + PROBE_TOKENS] for start in starts]
        return cls(
            student,
            judge,
            prompts,
            await _continued(student, prompts),
            await _continued(judge, prompts),
            [Probe(ids, PROMPT_TOKENS) for ids in whole],
        )

    def __call__(self) -> dict[str, Any]:
        """The record of this moment; call it outside an event loop (the engine evaluates in a thread)."""
        record: dict[str, Any] = exact_divergences(self.student, self.judge, self.fixed)
        record["fresh"] = exact_divergences(
            self.student, self.judge, asyncio.run(_continued(self.student, self.prompts))
        )
        record["teacher"] = exact_divergences(self.student, self.judge, self.taught)
        record["accuracy"] = _accuracy(self.student, self.text)
        return record


async def _continued(model: Student, prompts: list[Int32]) -> list[Probe]:
    drawn = await InProcessSampler(model).sample_batch(prompts, 1, SamplingParams(max_tokens=PROBE_TOKENS, seed=7))
    return [Probe(np.concatenate([one.prompt_ids, one.completion_ids]), one.prompt_ids.size) for (one,) in drawn]


@torch.inference_mode()
def _accuracy(student: Student, text: list[Probe]) -> float:
    ids = torch.from_numpy(np.stack([probe.ids for probe in text]).astype(np.int64)).to(student.device)
    inputs = ids[:, :-1]
    first = text[0].prompt_len - 1
    rows = (torch.arange(len(text))[:, None] * inputs.shape[1] + torch.arange(first, inputs.shape[1])).flatten()
    logits = student.logit_rows(inputs, torch.ones_like(inputs), rows.to(student.device))
    return float((logits.argmax(-1) == ids[:, first + 1 :].flatten()).double().mean())
