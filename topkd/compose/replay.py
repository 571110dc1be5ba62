"""``replay``: the same engine over a cache, with no server at all."""

from __future__ import annotations

import contextlib
from pathlib import Path

from topkd.compose.cache.contents import as_replayed, cache_folder, find_recorded_run
from topkd.compose.cache.rollouts import RecordedSampler, build_policy_identity
from topkd.compose.cache.shuffled import ShuffledRollouts
from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.run_prompts import load_prompts
from topkd.compose.progress import Progress
from topkd.compose.run.observers import open_observers
from topkd.compose.run.resume import enter_run
from topkd.compose.run.runner import RunResult, run
from topkd.compose.run.signals import StopSignals
from topkd.compose.run.student import load_student
from topkd.compose.teachers.feedback import build_feedback_context
from topkd.offline import ReplayScorer, ScoreStore


async def replay(
    config: RunConfig,
    out: Path,
    progress: Progress | None = None,
    *,
    cache: Path | None = None,
    resume: bool = False,
    stops: StopSignals | None = None,
) -> RunResult:
    """Train from what a cache holds; a miss is a CacheMissError.

    Completions that no recorded run drew (given with the data, or a teacher's own) need an objective that may learn
    off-policy; another one is refused.

    Args:
        config: As for ``train``; the objective may be another than the recorded one. Behaviour logprobs are the
            recorded ones, so importance sampling corrects for the difference.
        out: Folder of the new run.
        progress: Told what goes on.
        cache: The folder; None takes ``config.cache.path``.
        resume: Go on with the replay that ``out`` holds.
        stops: Signals that end it in order, to be resumed.
    """
    progress = progress or Progress()
    path, config = cache_folder(config, cache), as_replayed(config)
    with ScoreStore(path) as store, contextlib.ExitStack() as stack:
        found = find_recorded_run(store, config)
        teachers, policy = {name: ReplayScorer(store, who) for name, who in found.teachers.items()}, found.policy
        former, ranks = stack.enter_context(enter_run(out, config, progress, command="replay", resume=resume))
        if former.finished:
            return RunResult.of_finished(out, former)
        prompts = load_prompts(config, progress)
        pieces = load_student(config, progress, prompts)
        sampler = RecordedSampler(None, store, policy)
        itself = build_policy_identity(config, pieces.student, pieces.rows, found.teachers) == policy
        source = None
        if config.replay.order == "shuffled":
            source = ShuffledRollouts(store, policy, pieces.rows, teachers=teachers, config=config, progress=progress)
        async with open_observers(
            _drop_ceiling(config), student=pieces.student, prompts=prompts, models={}, teachers={}, out=out,
            progress=progress, former=former,
        ) as watch:  # fmt: skip
            return await run(
                watch.config,
                student=pieces.student,
                tokenizer=pieces.tokenizer,
                rows=pieces.rows,
                teachers=teachers,
                out=out,
                progress=progress,
                evaluate=watch.evaluate,
                on_record=watch.heard,
                context=build_feedback_context(config, prompts),
                wrap=lambda _: sampler,
                source=source,
                foreign=not itself,
                ranks=ranks,
                former=former,
                command="replay",
                stops=stops,
                account=lambda: {
                    "event": "replayed",
                    "cache": str(path),
                    "policy": policy.revision,
                    "scores": {name: teacher.metrics.as_dict() for name, teacher in teachers.items()},
                },
            )


def _drop_ceiling(config: RunConfig) -> RunConfig:
    """There is no teacher here that could answer for itself."""
    if config.eval is None or not config.eval.ceiling:
        return config
    return config.model_copy(update={"eval": config.eval.model_copy(update={"ceiling": False})})
