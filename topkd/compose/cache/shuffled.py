"""All recorded completions as training data: in random order by a seed, epoch after epoch."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from topkd.compose.progress import Progress
from topkd.engine import EngineConfig
from topkd.engine.loop.prompts import PromptRow, step_indices
from topkd.engine.loop.scoring import find_teacher
from topkd.offline import ReplayScorer, ScoreStore, TeacherIdentity
from topkd.offline.store.records import ROLLOUT
from topkd.topk.errors import CacheMissError, ConfigError
from topkd.topk.samples import Rollout, SamplingParams


@dataclass(frozen=True, slots=True)
class _Place:
    """The location of a completion: row of its prompt, its request, and its index in the reply."""

    row: int
    params: SamplingParams
    n: int
    which: int


class ShuffledRollouts:
    """The rollouts of each step, drawn without replacement from the completions in a cache that have scores.

    Args:
        store: The cache.
        policy: The policy that sampled the rollouts.
        rows: Prompts with their teachers; completions of other prompts are left out.
        teachers: The teachers that must have scored the completions.
        config: Batch size, K, seed and the share that may lack a score.
        progress: Shows how many completions are left out.
    """

    def __init__(
        self,
        store: ScoreStore,
        policy: TeacherIdentity,
        rows: Sequence[PromptRow],
        *,
        teachers: dict[str, ReplayScorer],
        config: EngineConfig,
        progress: Progress,
    ) -> None:
        self._store, self._policy, self._rows, self._config = store, policy, rows, config
        self._places: list[_Place] = []
        self._fill(teachers, progress)

    def __len__(self) -> int:
        """Return how many completions there are to draw from."""
        return len(self._places)

    async def __call__(self, step: int) -> tuple[list[PromptRow], list[Rollout]]:
        """Return the rows and rollouts of one step."""
        return await asyncio.to_thread(self._step, step)

    def _step(self, step: int) -> tuple[list[PromptRow], list[Rollout]]:
        wanted = self._config.rollout.prompts_per_step * self._config.rollout.samples_per_prompt
        places = [self._places[i] for i in step_indices(len(self), wanted, step, self._config.seed)]
        return [self._rows[place.row] for place in places], [self._read(place) for place in places]

    def _read(self, place: _Place) -> Rollout:
        prompt = self._rows[place.row].prompt_ids
        found = self._store.get_rollouts(self._policy, prompt, place.n, place.params)
        if found is None:
            raise CacheMissError(
                "recorded rollouts cannot be read any more",
                where=f"{self._store.path}, prompt {prompt[:6].tolist()}..",
                hint="run `topkd cache verify`",
            )
        return found[place.which]

    def _fill(self, teachers: dict[str, ReplayScorer], progress: Progress) -> None:
        by_prompt = _by_prompt(self._rows)
        unknown = unscored = 0
        for record in self._store.records(kinds=(ROLLOUT,)):
            if record.header.tag != self._policy.tag:
                continue
            rollouts = record.rollouts()
            if not rollouts:  # a request whose completions could not be read back as ids
                continue
            row = by_prompt.get(rollouts[0].prompt_ids.tobytes())
            if row is None:
                unknown += len(rollouts)
                continue
            seen, identity = self._rows[row].teacher_prompt_ids, find_teacher(teachers, self._rows[row].teacher_id)
            assert isinstance(identity, ReplayScorer)  # noqa: S101 - ``teachers`` has no other type
            for which, rollout in enumerate(rollouts):
                ids = np.concatenate([seen, rollout.completion_ids])
                if self._store.covers(identity.identity, ids, seen.size - 1, self._config.k):
                    self._places.append(_Place(row, rollout.sampling, len(rollouts), which))
                else:
                    unscored += 1
        if unscored > self._config.max_lost_fraction * (unscored + len(self)) or not self._places:
            raise CacheMissError(
                "recorded completions have no score" if unscored else "no recorded completion has one of these prompts",
                where=f"{self._store.path}, policy {self._policy.revision!r}",
                got=f"{unscored} of {unscored + len(self)} without a score at K {self._config.k}"
                if unscored
                else f"{unknown} completions of other prompts",
                expected=f"at most the share max_lost_fraction = {self._config.max_lost_fraction}"
                if unscored
                else None,
                hint="score them with `topkd score CACHE`, ask for a smaller k, or check data.path and the teacher",
            )
        for number, why in ((unknown, "of prompts that the data file lacks"), (unscored, "without a score")):
            if number:
                progress.note(f"{number} recorded completions {why} are left out")
        progress.note(f"{len(self)} recorded completions to draw from")


def _by_prompt(rows: Sequence[PromptRow]) -> dict[bytes, int]:
    found: dict[bytes, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        found[row.prompt_ids.astype(np.int32).tobytes()].append(number)
    for numbers in found.values():
        contexts = {(rows[number].teacher_prompt_ids.tobytes(), rows[number].teacher_id) for number in numbers}
        if len(contexts) > 1:
            raise ConfigError(
                "rows with the same prompt have different teachers or hints: a shuffled replay cannot tell them apart",
                where=f"row {rows[numbers[0]].sample_id}", hint='use replay.order = "recorded"',
            )  # fmt: skip
    return {prompt: numbers[0] for prompt, numbers in found.items()}
