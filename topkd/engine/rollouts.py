"""A step's rollouts: which prompts, from which seed, by which sampler."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from topkd.engine.candidates import support_of
from topkd.engine.config import EngineConfig
from topkd.engine.data import PromptRow, step_indices
from topkd.engine.mixing import data_rollouts, on_policy_prompts
from topkd.topk.protocols import Ids, Sampler
from topkd.topk.samples import Rollout, SamplingParams


@runtime_checkable
class BatchSampler(Protocol):
    """A sampler that decodes many prompts together."""

    async def sample_batch(
        self, prompts: Sequence[Ids], n: int, params: SamplingParams, *, k: int = 0
    ) -> list[list[Rollout]]:
        """N rollouts for each prompt."""
        ...


async def draw(
    config: EngineConfig, rows: Sequence[PromptRow], sampler: Sampler, step: int
) -> tuple[list[PromptRow], list[Rollout]]:
    """The rollouts of step ``step``, each with its row: the same for the same seed and weights.

    Completions from the data that the teacher is to score follow them.
    """
    chosen = [rows[i] for i in step_indices(len(rows), on_policy_prompts(config), step, config.seed)]
    data, given = data_rollouts(config, rows, step)
    if not chosen:
        return data, given
    params = SamplingParams(
        max_tokens=config.rollout.max_completion_tokens,
        stop_token_ids=config.rollout.stop_token_ids,
        seed=derived_seed(config.seed, "rollout", step),
    )
    n, prompts = config.rollout.samples_per_prompt, [row.prompt_ids for row in chosen]
    k = 0 if support_of(config.objective) == "teacher" else config.k  # the student's own lists are seldom needed
    if isinstance(sampler, BatchSampler):
        drawn = await sampler.sample_batch(prompts, n, params, k=k)
    else:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(sampler.sample(prompt, n, params, k=k)) for prompt in prompts]
        drawn = [task.result() for task in tasks]
    return [*(row for row in chosen for _ in range(n)), *data], [*(one for group_ in drawn for one in group_), *given]


def derived_seed(seed: int, *path: object) -> int:
    """A 31-bit seed for one purpose of a run, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *path)).encode(), digest_size=4).digest(), "big") >> 1
