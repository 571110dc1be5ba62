"""``[cache]`` of a live run: its teachers answer from the store where it can, its rollouts are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from topkd.compose.cache.identity import build_served_identity
from topkd.compose.cache.rollouts import RecordedSampler, build_policy_identity
from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import CacheConfig
from topkd.engine.loop.prompts import PromptRow
from topkd.offline import CachingScorer, ScoreStore
from topkd.topk.protocols import Sampler, TeacherScorer


class _Sampling(Protocol):
    @property
    def sampler(self) -> Sampler: ...
    def drawing_from(self, sampler: Sampler) -> Self: ...


T = TypeVar("T", bound=_Sampling)


@contextlib.contextmanager
def open_cache(config: CacheConfig | None) -> Iterator[LiveCache | None]:
    """Open the cache of a live run; None without ``[cache]``."""
    if config is None:
        yield None
        return
    with LiveCache(config) as cache:
        yield cache


class LiveCache:
    """An open store, and what the run's pieces look like with it around them."""

    def __init__(self, config: CacheConfig) -> None:
        self.store = ScoreStore(config.path, mode="a", codec=config.codec)
        self._scorers: dict[str, CachingScorer] = {}
        self._sampler: RecordedSampler | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.close()

    def scorer(self, name: str, live: TeacherScorer, model: str, revision: str) -> CachingScorer:
        """The teacher called ``name`` in the config, with the cache before it."""
        found = CachingScorer(live, self.store, build_served_identity(self.store, model, revision))
        self._scorers[name] = found
        return found

    def record_rollouts(
        self,
        sampling: T,
        config: RunConfig,
        student: Any,
        rows: Sequence[PromptRow],
        loss: Callable[..., Any] | None = None,
    ) -> T:
        """Return the sampling with its rollouts kept here; call it when all teachers are there."""
        teachers = {name: scorer.identity for name, scorer in self._scorers.items()}
        policy = build_policy_identity(config, student, rows, teachers, loss=loss)
        self._sampler = RecordedSampler(sampling.sampler, self.store, policy)
        return sampling.drawing_from(self._sampler)

    def account(self) -> dict[str, Any]:
        """What was kept and spared, for the run log."""
        return {
            "event": "cached",
            "cache": str(self.store.path),
            "policy": "" if self._sampler is None else self._sampler.policy.revision,
            "rollouts": {} if self._sampler is None else self._sampler.metrics.as_dict(),
            "scores": {name: scorer.metrics.as_dict() for name, scorer in self._scorers.items()},
        }
