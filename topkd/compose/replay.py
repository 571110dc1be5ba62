"""``replay``: train from a cache, with no server."""

from __future__ import annotations

from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from topkd.compose.cache.contents import RecordedRun, as_replayed, cache_folder
from topkd.compose.cache.rollouts import RecordedSampler, build_policy_identity
from topkd.compose.cache.shuffled import ShuffledRollouts
from topkd.compose.config.run_config import RunConfig
from topkd.compose.preflight.preflight import Preflight, preflight
from topkd.compose.progress import Progress
from topkd.compose.run.observers import open_observers
from topkd.compose.run.run import RunResult, open_run
from topkd.compose.run.runner import TrainingParts, load_student, run_training
from topkd.compose.run.sampler import open_in_process
from topkd.compose.run.signals import StopSignals
from topkd.compose.teachers.open import Teachers
from topkd.offline import ReplayScorer, ScoreStore


async def replay(
    config: RunConfig,
    out: str | Path,
    progress: Progress | None = None,
    *,
    cache: str | Path | None = None,
    resume: bool = False,
    signals: StopSignals | None = None,
) -> RunResult:
    """Train from the rollouts and scores in a cache, with no server.

    One that is missing raises CacheMissError; with ``replay.missing = "lose"``, a sample without a score is lost.
    Completions that no recorded run sampled (from the data, or from a teacher) need an objective that may learn
    off-policy; any other objective is refused.

    Args:
        config: As for ``train``; the objective may differ from the recorded one. Behaviour logprobs are the
            recorded ones, so importance sampling corrects for the difference.
        out: Folder of the new run.
        progress: Shows notes and records.
        cache: Folder of the cache; None uses ``config.cache.path``.
        resume: Whether to continue the replay in ``out``.
        signals: Signals on which the replay saves a checkpoint and ends; it can be resumed.
    """
    config = as_replayed(config)
    path = cache_folder(config, None if cache is None else Path(cache))
    async with open_run(config, out, command="replay", resume=resume, progress=progress, signals=signals) as run:
        if run.is_finished:
            return run.result()
        findings = await preflight(Preflight(config, run.progress, is_replay=True, cache=path))
        recorded, prompts = findings.recorded_run, findings.loaded_prompts
        store = run.enter(ScoreStore(path))
        scorers = {name: ReplayScorer(store, identity) for name, identity in recorded.teachers.items()}
        source = None
        if config.replay.order == "shuffled":
            source = ShuffledRollouts(
                store, recorded.policy, prompts.rows, teachers=scorers, config=config, progress=run.progress
            )
        student = load_student(config, prompts)
        sampler = RecordedSampler(None, store, recorded.policy)
        sampling = open_in_process(config, student, prompts.tokenizer).drawing_from(sampler)
        teachers = Teachers({**scorers}, fingerprints=_describe_teachers(recorded))
        observers = await run.enter_async(open_observers(config, student, findings, teachers, run))
        parts = replace_fields(
            TrainingParts.of_run_file(config, student, findings, teachers, sampling=sampling, observers=observers),
            source=source,
            is_remembered=True,
            is_foreign=build_policy_identity(config, student, prompts.rows, recorded.teachers) != recorded.policy,
            account=lambda: {
                "event": "replayed",
                "cache": str(path),
                "policy": recorded.policy.revision,
                "scores": {name: scorer.metrics.as_dict() for name, scorer in scorers.items()},
            },
        )
        return await run_training(run, parts)


def _describe_teachers(recorded: RecordedRun) -> dict[str, dict[str, Any]]:
    """Describe the teachers whose scores the cache holds, in the form of the run log's first event."""
    return {
        name: {"model": who.name, "revision": who.revision, "kind": "cache"} for name, who in recorded.teachers.items()
    }
