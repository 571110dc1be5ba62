"""Rollouts that are kept, and given again: the sampler of a live run with a cache, and of its replay."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from topkd.compose.cache.identity import list_identities
from topkd.compose.config.functions import load_loss
from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.digests import digest_weights
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.rollouts import BatchSampler, derive_seed
from topkd.offline import CacheMetrics, ScoreStore, TeacherIdentity
from topkd.offline.store.records import ROLLOUT
from topkd.topk.errors import CacheError, CacheMissError, ConfigError
from topkd.topk.protocols import Ids, Sampler
from topkd.topk.samples import Rollout, SamplingParams

# What changes no rollout: how long the run is, where its servers are, what is written down.
_UNSHAPING = {"steps", "eval_every", "max_lost_fraction", "client", "cache", "replay", "data", "student"}
_UNSHAPING |= {"checkpoint", "teacher", "teachers", "eval", "track", "sampler"}


class RecordedSampler:
    """A batch sampler that keeps what it draws, each prompt's completions under a seed of its own.

    A batch is drawn under one seed, and may hold a prompt twice: the place in the batch goes into the key. With no
    sampler inside, everything must be in the store, and a miss is a CacheMissError.

    Args:
        sampler: The live sampler, or None to replay.
        store: Open for appending (for reading when replaying).
        policy: Whose rollouts these are.
    """

    def __init__(self, sampler: Sampler | None, store: ScoreStore, policy: TeacherIdentity) -> None:
        self._sampler, self._store, self.policy = sampler, store, policy
        self.metrics = CacheMetrics()

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """See ``topkd.topk.protocols.Sampler``."""
        return (await self.sample_batch([prompt_ids], n, params, k=k))[0]

    async def sample_batch(
        self, prompts: Sequence[Ids], n: int, params: SamplingParams, *, k: int = 0
    ) -> list[list[Rollout]]:
        """n rollouts for each prompt; ``Rollout.sampling`` names the prompt's own seed."""
        if params.seed is None:
            raise ConfigError("rollouts are kept under their seed", got="no seed")
        own = [replace(params, seed=derive_seed(params.seed, "prompt", place)) for place in range(len(prompts))]
        stored = await asyncio.to_thread(self._read, prompts, n, own, k)  # disk reads and checksums
        missing = [place for place, rollouts in enumerate(stored) if rollouts is None]
        if missing:
            if self._sampler is None:
                raise self._miss(prompts[missing[0]], n, own[missing[0]])
            drawn = await self._draw(self._sampler, prompts, n, params, k)
            await asyncio.to_thread(self._write, prompts, drawn, own, k)
            stored = await asyncio.to_thread(self._read, prompts, n, own, k)
        rollouts = [group for group in stored if group is not None]
        if len(rollouts) < len(prompts):
            raise CacheError("rollouts that were just written cannot be read", where=str(self._store.path))
        tokens = sum(rollout.completion_ids.size for group in rollouts for rollout in group)
        if missing:
            self.metrics.misses += 1
            self.metrics.asked_tokens += tokens
        else:
            self.metrics.hits += 1
            self.metrics.saved_tokens += tokens
        return rollouts

    def _read(
        self, prompts: Sequence[Ids], n: int, params: Sequence[SamplingParams], k: int
    ) -> list[list[Rollout] | None]:
        pairs = zip(prompts, params, strict=True)
        return [self._store.get_rollouts(self.policy, prompt, n, own, k=k) for prompt, own in pairs]

    def _write(
        self, prompts: Sequence[Ids], drawn: list[list[Rollout]], params: Sequence[SamplingParams], k: int
    ) -> None:
        for prompt, rollouts, own in zip(prompts, drawn, params, strict=True):
            kept = [replace(rollout, sampling=own) for rollout in rollouts]
            self._store.put_rollouts(self.policy, prompt, kept, own, k=k)
        self._store.commit()

    @staticmethod
    async def _draw(
        sampler: Sampler, prompts: Sequence[Ids], n: int, params: SamplingParams, k: int
    ) -> list[list[Rollout]]:
        if isinstance(sampler, BatchSampler):
            return await sampler.sample_batch(prompts, n, params, k=k)
        return list(await asyncio.gather(*(sampler.sample(prompt, n, params, k=k) for prompt in prompts)))

    def _miss(self, prompt: Ids, n: int, params: SamplingParams) -> CacheMissError:
        return CacheMissError(
            "the cache has no such rollouts",
            where=f"{self._store.path}, policy {self.policy.name!r} revision {self.policy.revision!r}, "
            f"prompt {np.asarray(prompt)[:6].tolist()}..",
            expected=f"{n} completions of at most {params.max_tokens} tokens at this step",
            hint="keep the recorded run's data, seed, rollout settings and no more steps than it had, "
            'or set replay.order = "shuffled"',
        )


def build_policy_identity(
    config: RunConfig,
    student: Any,
    rows: Sequence[PromptRow],
    teachers: Mapping[str, TeacherIdentity],
    *,
    loss: Callable[..., Any] | None = None,
) -> TeacherIdentity:
    """Who samples in this run: everything that shapes its rollouts, so that another run never finds them as its own.

    A custom objective is known by its name and source.
    """
    prompts = hashlib.blake2b(digest_size=16)
    for row in rows:
        for part in (row.prompt_ids, row.teacher_prompt_ids):
            prompts.update(len(part).to_bytes(4, "little") + part.tobytes())
        prompts.update(row.teacher_id.encode() + b"\0")
    shaping = {
        "config": config.model_dump(mode="json", exclude=_UNSHAPING) | config.sampler.shaping(),
        "student": [config.student.device, config.student.dtype, digest_weights(student)],
        "teachers": {name: identity.to_json() for name, identity in teachers.items()},
        "prompts": prompts.hexdigest(),
    }
    if (function := loss or load_loss(config.objective)) is not None:
        shaping["loss"] = _source(function)
    digest = hashlib.blake2b(json.dumps(shaping, sort_keys=True).encode(), digest_size=8).hexdigest()
    return TeacherIdentity(Path(config.student.model).name or "student", revision=f"run-{digest}")


def _source(loss: Callable[..., Any]) -> list[str]:
    try:
        return [loss.__module__, loss.__qualname__, inspect.getsource(loss)]
    except (AttributeError, OSError, TypeError) as error:
        raise ConfigError(
            "the loss has no source to know it by", got=type(loss).__name__,
            expected="a function of a file, so that [cache] keeps its rollouts apart from another loss's",
            hint="write it into a file, or run without [cache]",
        ) from error  # fmt: skip


def choose_policy(path: Path, revision: str | None) -> TeacherIdentity:
    """The policy to replay: the one of that revision, or the cache's only one."""
    found = list_identities(path, ROLLOUT)
    chosen = [policy for policy in found if revision is None or policy.revision == revision]
    if not found:
        raise CacheMissError(
            "the cache holds no rollouts",
            where=str(path),
            hint="record a run with [cache], or score rows with logp; scores of the data's own completions alone are "
            'replayed with on_policy_fraction = 0, data_loss = "objective" and a direct objective such as kd',
        )
    if len(chosen) != 1:
        raise ConfigError(
            "which recorded run is to be replayed?" if revision is None else "no recorded run of that revision",
            where=str(path), got=revision or f"{len(chosen)} runs",
            expected="replay.policy = " + " or ".join(repr(policy.revision) for policy in found),
        )  # fmt: skip
    return chosen[0]
