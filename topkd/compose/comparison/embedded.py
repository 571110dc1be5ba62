"""Measurements of a comparison on the embedded pair: exact divergences on three kinds of prefixes, and accuracy."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkd.compose.demo_assets.assets import PROMPT_TOKENS, continue_prompts
from topkd.engine.loop.loop import Source
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.rollouts import BatchSampler
from topkd.engine.models.divergences import Probe, exact_divergences
from topkd.engine.models.local_teacher import LocalTeacher
from topkd.engine.models.student import Student
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import Ids, Sampler
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Int32

PROBE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Measures:
    """The evaluation hook of the embedded pair.

    The top level of its record is measured on *fixed* prefixes: held-out prompts continued by the untrained student,
    the same for every cell. ``fresh`` is measured on the current student's continuations of the same prompts,
    ``teacher`` on the teacher's. ``accuracy`` is how often the student's most likely token is the text's next token.
    """

    student: Student
    judge: Student
    prompts: list[Int32]
    fixed: list[Probe]
    taught: list[Probe]
    text: list[Probe]

    @classmethod
    async def prepared(cls, student: Student, judge: Student, held_out: NDArray[np.int32], probes: int) -> Measures:
        """Prepare measures on ``probes`` held-out prompts, which do not depend on the cell's seed."""
        starts = np.random.default_rng(0).integers(0, len(held_out) - PROMPT_TOKENS - PROBE_TOKENS, size=probes)
        prompts = [held_out[start : start + PROMPT_TOKENS] for start in starts]
        whole = [held_out[start : start + PROMPT_TOKENS + PROBE_TOKENS] for start in starts]
        return cls(
            student,
            judge,
            prompts,
            await continue_prompts(student, prompts, PROBE_TOKENS),
            await continue_prompts(judge, prompts, PROBE_TOKENS),
            [Probe(ids, PROMPT_TOKENS) for ids in whole],
        )

    def __call__(self) -> dict[str, Any]:
        """Measure now; call it outside an event loop (the engine evaluates in a thread)."""
        record: dict[str, Any] = exact_divergences(self.student, self.judge, self.fixed)
        record["fresh"] = exact_divergences(
            self.student, self.judge, asyncio.run(continue_prompts(self.student, self.prompts, PROBE_TOKENS))
        )
        record["teacher"] = exact_divergences(self.student, self.judge, self.taught)
        record["accuracy"] = _measure_accuracy(self.student, self.text)
        return record


@torch.inference_mode()
def _measure_accuracy(student: Student, text: list[Probe]) -> float:
    ids = torch.from_numpy(np.stack([probe.ids for probe in text]).astype(np.int64)).to(student.device)
    inputs = ids[:, :-1]
    first = text[0].prompt_len - 1
    rows = (torch.arange(len(text))[:, None] * inputs.shape[1] + torch.arange(first, inputs.shape[1])).flatten()
    logits = student.logit_rows(inputs, torch.ones_like(inputs), rows.to(student.device))
    return float((logits.argmax(-1) == ids[:, first + 1 :].flatten()).double().mean())


_STEPS_KEPT = 4  # steps whose rollouts are sampled and may still have to be scored


class StepTeacher(LocalTeacher):
    """Scores all sequences of a step in one forward pass, and any other sequence in its own pass.

    The sequences that share a pass do not depend on timing, so that a rerun has the same rounding.
    """

    def __init__(self, model: Student) -> None:
        super().__init__(model)
        self._lock = threading.Lock()
        self._steps: deque[_Step] = deque(maxlen=_STEPS_KEPT)

    def expect(self, rollouts: Sequence[Rollout]) -> None:
        """Remember the rollouts of a step, whose completions will be scored."""
        step = _Step(rollouts)
        with self._lock:
            self._steps.append(step)

    @torch.inference_mode()
    def _logp(self, ids: NDArray[np.int64], start: int) -> Tensor:
        key = ids.tobytes()
        with self._lock:
            step = next((step for step in self._steps if key in step.rows), None)
            found = None if step is None else step.logp(self.model, key)
        if found is None or start != ids.size - 1 - len(found):
            return super()._logp(ids, start)
        return found


class _Step:
    """The sequences of one step, with the logprobs at their completions, which are computed at the first call."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.sequences = [
            np.concatenate([rollout.prompt_ids, rollout.completion_ids]).astype(np.int64) for rollout in rollouts
        ]
        self.firsts = [rollout.prompt_ids.size - 1 for rollout in rollouts]
        ends = np.cumsum([rollout.completion_ids.size for rollout in rollouts])
        self.rows = {
            ids.tobytes(): slice(int(end) - rollout.completion_ids.size, int(end))
            for ids, rollout, end in zip(self.sequences, rollouts, ends, strict=True)
        }
        self._logp: Tensor | None = None

    def logp(self, model: Student, key: bytes) -> Tensor:
        """Return float64 [R, V] on the CPU: the logprobs at the completion of one sequence."""
        if self._logp is None:
            width = max(ids.size for ids in self.sequences) - 1
            inputs = torch.zeros(len(self.sequences), width, dtype=torch.long)
            attention = torch.zeros_like(inputs)
            rows = []
            for index, (ids, first) in enumerate(zip(self.sequences, self.firsts, strict=True)):
                inputs[index, : ids.size - 1] = torch.from_numpy(ids[:-1])
                attention[index, : ids.size - 1] = 1
                rows.append(torch.arange(index * width + first, index * width + ids.size - 1))
            device = model.device
            logits = model.logit_rows(inputs.to(device), attention.to(device), torch.cat(rows).to(device))
            self._logp = torch.log_softmax(logits.double(), dim=-1).cpu()
        return self._logp[self.rows[key]]


FILE = "rollouts.npz"


Drawn: TypeAlias = Callable[[Sequence[Rollout]], None]


class RolloutRecorder:
    """Records the rollouts of a sampler, step by step: call ``around``, sample, then call ``write``.

    ``drawn`` is called with the rollouts of each step, before they are returned.
    """

    def __init__(self, drawn: Drawn) -> None:
        self.steps: list[list[Rollout]] = []
        self._drawn = drawn
        self._inner: BatchSampler | None = None

    def around(self, sampler: Sampler) -> Sampler:
        """Return a sampler that samples from ``sampler`` and records the rollouts."""
        if not isinstance(sampler, BatchSampler):
            raise ConfigError("only a sampler of whole batches can be recorded", got=type(sampler).__name__)
        self._inner = sampler
        return self

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """See ``topkd.topk.protocols.Sampler``."""
        return (await self.sample_batch([prompt_ids], n, params, k=k))[0]

    async def sample_batch(
        self, prompts: Sequence[Ids], n: int, params: SamplingParams, *, k: int = 0
    ) -> list[list[Rollout]]:
        """Sample n rollouts for each prompt from the inner sampler."""
        if self._inner is None:
            raise ConfigError("there is no sampler to record", hint="call around(sampler) first")
        drawn = await self._inner.sample_batch(prompts, n, params, k=k)
        self.steps.append([rollout for group in drawn for rollout in group])
        self._drawn(self.steps[-1])
        return drawn

    def write(self, folder: Path) -> None:
        """Write ids, lengths and behaviour logprobs, without rounding."""
        flat = [rollout for step in self.steps for rollout in step]
        np.savez(
            folder / FILE,
            steps=np.array([len(step) for step in self.steps]),
            prompts=np.array([rollout.prompt_ids.size for rollout in flat]),
            prompt_ids=np.concatenate([rollout.prompt_ids for rollout in flat]),
            lengths=np.array([rollout.completion_ids.size for rollout in flat]),
            ids=np.concatenate([rollout.completion_ids for rollout in flat]),
            logp=np.concatenate([rollout.logp for rollout in flat]),
        )


def read_cell_rollouts(folder: Path, rows: Sequence[PromptRow], drawn: Drawn) -> Source:
    """Read the rollouts that a cell wrote, as batches of another cell; ``drawn`` is called with those of each step."""
    with np.load(folder / FILE) as stored:
        counts, sizes, lengths = stored["steps"], stored["prompts"], stored["lengths"]
        prompts = np.split(stored["prompt_ids"], np.cumsum(sizes)[:-1])
        ids, logp = (np.split(stored[name], np.cumsum(lengths)[:-1]) for name in ("ids", "logp"))
    row_of = {row.prompt_ids.tobytes(): row for row in rows}
    ends = np.cumsum(counts)

    async def source(step: int) -> tuple[list[PromptRow], list[Rollout]]:
        part = range(int(ends[step] - counts[step]), int(ends[step]))
        params = SamplingParams(max_tokens=int(lengths[part].max()))
        rollouts = [Rollout(prompts[i], ids[i], logp[i], "length", params) for i in part]
        drawn(rollouts)
        return [row_of[rollout.prompt_ids.tobytes()] for rollout in rollouts], rollouts

    return source
