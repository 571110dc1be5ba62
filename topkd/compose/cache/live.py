"""``[cache]`` of a live run: its teachers answer from the store where it can, its rollouts are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from topkd.compose.cache.identity import build_served_identity
from topkd.compose.cache.rollouts import RecordedSampler, build_policy_identity
from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import CacheConfig
from topkd.engine.loop.prompts import PromptRow
from topkd.offline import CachingScorer, ScoreStore
from topkd.topk.protocols import Sampler, TeacherScorer


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

    def recorder(
        self, config: RunConfig, student: Any, rows: Sequence[PromptRow], loss: Callable[..., Any] | None = None
    ) -> Callable[[Sampler], Sampler]:
        """Puts the keeping of rollouts around a sampler; call it when all teachers are there."""
        teachers = {name: scorer.identity for name, scorer in self._scorers.items()}
        policy = build_policy_identity(config, student, rows, teachers, loss=loss)

        def wrap(sampler: Sampler) -> Sampler:
            self._sampler = RecordedSampler(sampler, self.store, policy)
            return self._sampler

        return wrap

    def account(self) -> dict[str, Any]:
        """What was kept and spared, for the run log."""
        return {
            "event": "cached",
            "cache": str(self.store.path),
            "policy": "" if self._sampler is None else self._sampler.policy.revision,
            "rollouts": {} if self._sampler is None else self._sampler.metrics.as_dict(),
            "scores": {name: scorer.metrics.as_dict() for name, scorer in self._scorers.items()},
        }
