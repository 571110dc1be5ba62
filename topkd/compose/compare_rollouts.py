"""Rollouts that one cell drew and others learn from: the matched, off-policy part of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from topkd.engine.data import PromptRow
from topkd.engine.loop import Source
from topkd.engine.rollouts import BatchSampler
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import Ids, Sampler
from topkd.topk.samples import Rollout, SamplingParams

FILE = "rollouts.npz"
Drawn: TypeAlias = Callable[[Sequence[Rollout]], None]


class Recording:
    """Keeps every rollout that passes, step by step; ``around`` a sampler, then ``write``.

    ``drawn`` is told each step's rollouts, before anybody else sees them.
    """

    def __init__(self, drawn: Drawn) -> None:
        self.steps: list[list[Rollout]] = []
        self._drawn = drawn
        self._inner: BatchSampler | None = None

    def around(self, sampler: Sampler) -> Sampler:
        """The sampler that draws from ``sampler`` and is remembered."""
        if not isinstance(sampler, BatchSampler):
            raise ConfigError("only a sampler that draws whole batches can be recorded", got=type(sampler).__name__)
        self._inner = sampler
        return self

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """See ``topkd.topk.protocols.Sampler``."""
        return (await self.sample_batch([prompt_ids], n, params, k=k))[0]

    async def sample_batch(
        self, prompts: Sequence[Ids], n: int, params: SamplingParams, *, k: int = 0
    ) -> list[list[Rollout]]:
        """N rollouts for each prompt, from the inner sampler."""
        if self._inner is None:
            raise ConfigError("nothing to record from", hint="put the recording around a sampler first")
        drawn = await self._inner.sample_batch(prompts, n, params, k=k)
        self.steps.append([rollout for group in drawn for rollout in group])
        self._drawn(self.steps[-1])
        return drawn

    def write(self, folder: Path) -> None:
        """Ids, lengths and behaviour logprobs, exact."""
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


def read_rollouts(folder: Path, rows: Sequence[PromptRow], drawn: Drawn) -> Source:
    """The rollouts that a cell wrote, as the source of another's batches; ``drawn`` is told each step's."""
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
