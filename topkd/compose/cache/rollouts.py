"""``[cache]`` of a run: store scores and rollouts, and read them again."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from topkd.compose.cache.identity import build_served_identity
from topkd.compose.config.functions import load_loss
from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import CacheConfig
from topkd.compose.data.digests import digest_weights
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.rollouts import BatchSampler, derive_seed
from topkd.offline import CacheMetrics, CachingScorer, ScoreStore, TeacherIdentity
from topkd.topk.errors import CacheError, CacheMissError, ConfigError
from topkd.topk.protocols import Ids, Sampler, TeacherScorer
from topkd.topk.samples import Rollout, SamplingParams

# Settings that do not affect the rollouts: length of the run, servers, what is written to disk.
_UNSHAPING = {"steps", "eval_every", "max_lost_fraction", "client", "cache", "replay", "data", "student"}
_UNSHAPING |= {"checkpoint", "teacher", "teachers", "eval", "track", "sampler"}


class RecordedSampler:
    """A batch sampler that stores its rollouts, each prompt's completions under their own seed.

    A batch has one seed and may hold a prompt twice, so the index in the batch is part of the key. Without an inner
    sampler every rollout must be in the store; one that is not raises CacheMissError.

    Args:
        sampler: The live sampler, or None to replay.
        store: A store that is open for appending (for a replay: for reading).
        policy: Identity of the policy that samples.
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
        """Return n rollouts for each prompt; ``Rollout.sampling`` has the prompt's own seed."""
        if params.seed is None:
            raise ConfigError("rollouts can be stored only under a seed", got="no seed")
        own = [replace(params, seed=derive_seed(params.seed, "prompt", index)) for index in range(len(prompts))]
        stored = await asyncio.to_thread(self._read, prompts, n, own, k)  # disk reads and checksums
        missing = [index for index, rollouts in enumerate(stored) if rollouts is None]
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
            hint="use the recorded run's data, seed and rollout settings, and at most as many steps, "
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
    """Build this run's policy identity from all that affects its rollouts, so that no other run finds them as its own.

    A custom objective enters by its name and its source code.
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
        shaping["loss"] = _read_source(function)
    digest = hashlib.blake2b(json.dumps(shaping, sort_keys=True).encode(), digest_size=8).hexdigest()
    return TeacherIdentity(Path(config.student.model).name or "student", revision=f"run-{digest}")


def _read_source(loss: Callable[..., Any]) -> list[str]:
    try:
        return [loss.__module__, loss.__qualname__, inspect.getsource(loss)]
    except (AttributeError, OSError, TypeError) as error:
        raise ConfigError(
            "the source code of the loss cannot be read", got=type(loss).__name__,
            expected="a function in a file: a [cache] tells the rollouts of two losses apart by their source code",
            hint="write the loss into a file, or run without [cache]",
        ) from error  # fmt: skip


@contextlib.contextmanager
def open_cache(config: CacheConfig | None) -> Iterator[LiveCache | None]:
    """Open the cache of a live run; None without ``[cache]``."""
    if config is None:
        yield None
        return
    with ScoreStore(config.path, mode="a", codec=config.codec) as store:
        yield LiveCache(store)


class LiveCache:
    """The cache of a live run: it returns the scores that it has, and stores new scores and rollouts."""

    def __init__(self, store: ScoreStore) -> None:
        self.store = store
        self._scorers: dict[str, CachingScorer] = {}
        self._sampler: RecordedSampler | None = None

    def scorer(self, name: str, live: TeacherScorer, model: str, revision: str) -> CachingScorer:
        """Put the cache in front of the teacher ``name`` of the config."""
        scorer = CachingScorer(live, self.store, build_served_identity(self.store, model, revision))
        self._scorers[name] = scorer
        return scorer

    def record_rollouts(
        self,
        sampler: Sampler,
        config: RunConfig,
        student: Any,
        rows: Sequence[PromptRow],
        loss: Callable[..., Any] | None = None,
    ) -> RecordedSampler:
        """Return a sampler that stores its rollouts here; call this after ``scorer`` for every teacher."""
        teachers = {name: scorer.identity for name, scorer in self._scorers.items()}
        policy = build_policy_identity(config, student, rows, teachers, loss=loss)
        self._sampler = RecordedSampler(sampler, self.store, policy)
        return self._sampler

    def account(self) -> dict[str, Any]:
        """Return the counters of hits and misses, for the run log."""
        return {
            "event": "cached",
            "cache": str(self.store.path),
            "policy": "" if self._sampler is None else self._sampler.policy.revision,
            "rollouts": {} if self._sampler is None else self._sampler.metrics.as_dict(),
            "scores": {name: scorer.metrics.as_dict() for name, scorer in self._scorers.items()},
        }
