"""A step's rollouts: which prompts, from which seed, by which sampler."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from topkd.engine.config.engine_config import EngineConfig
from topkd.engine.loop.data_mixing import build_data_rollouts, count_on_policy_prompts
from topkd.engine.loop.prompts import PromptRow, step_indices
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import Ids, Sampler
from topkd.topk.samples import Rollout, SamplingParams

if TYPE_CHECKING:
    from topkd.engine.learner.distributed import Ranks


@runtime_checkable
class BatchSampler(Protocol):
    """A sampler that decodes many prompts together."""

    async def sample_batch(
        self, prompts: Sequence[Ids], n: int, params: SamplingParams, *, k: int = 0
    ) -> list[list[Rollout]]:
        """Sample n rollouts for each prompt."""
        ...


async def draw_rollouts(
    config: EngineConfig, rows: Sequence[PromptRow], sampler: Sampler, step: int, ranks: Ranks | None = None
) -> tuple[list[PromptRow], list[Rollout]]:
    """Sample the rollouts of step ``step``, each with its row; the same seed and weights give the same rollouts.

    A step's prompts are sampled in ``rollout.shards`` parts, each with its own seed; every process takes the same
    number of parts. Completions from the data that the teacher is to score come after them.
    """
    chosen = [rows[i] for i in step_indices(len(rows), count_on_policy_prompts(config), step, config.seed)]
    data_rows, data_rollouts = build_data_rollouts(config, rows, step)
    parts = count_shards(config, ranks)
    own_parts: Sequence[int] = range(parts)
    if ranks is not None:
        own_parts = ranks.slice(own_parts)
        data_rows, data_rollouts = list(ranks.slice(data_rows)), list(ranks.slice(data_rollouts))
    asked: list[PromptRow] = []
    drawn: list[Rollout] = []
    for part in own_parts:
        share = chosen[part * len(chosen) // parts : (part + 1) * len(chosen) // parts]
        seed = derive_seed(config.seed, "rollout", step, *(("part", part, parts) if parts > 1 else ()))
        asked += [row for row in share for _ in range(config.rollout.samples_per_prompt)]
        drawn += await _draw_share(config, share, sampler, seed) if share else []
    return [*asked, *data_rows], [*drawn, *data_rollouts]


def count_shards(config: EngineConfig, ranks: Ranks | None) -> int:
    """Count the parts in which a step's prompts are sampled: as configured, else one per process."""
    size = 1 if ranks is None else ranks.size
    parts = config.rollout.shards or size
    if parts % size:
        raise ConfigError(
            "rollout.shards must be a multiple of the number of processes, or 0",
            got=f"{parts} shards, {size} processes",
        )  # fmt: skip
    return parts


async def _draw_share(config: EngineConfig, chosen: Sequence[PromptRow], sampler: Sampler, seed: int) -> list[Rollout]:
    params = SamplingParams(
        max_tokens=config.rollout.max_completion_tokens, stop_token_ids=config.rollout.stop_token_ids, seed=seed
    )
    n, prompts = config.rollout.samples_per_prompt, [row.prompt_ids for row in chosen]
    k = 0 if config.objective.list_support == "teacher" else config.k  # the student's own lists are seldom needed
    if isinstance(sampler, BatchSampler):
        drawn = await sampler.sample_batch(prompts, n, params, k=k)
    else:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(sampler.sample(prompt, n, params, k=k)) for prompt in prompts]
        drawn = [task.result() for task in tasks]
    return [rollout for rollouts in drawn for rollout in rollouts]


def derive_seed(seed: int, *path: object) -> int:
    """Derive a 31-bit seed for one purpose of a run, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *path)).encode(), digest_size=4).digest(), "big") >> 1
