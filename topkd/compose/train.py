"""``train``: train a student from its teachers, with one config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from topkd.compose.cache.rollouts import open_cache
from topkd.compose.config.functions import load_loss
from topkd.compose.config.run_config import RunConfig
from topkd.compose.preflight.preflight import TEACHERS, Preflight, preflight
from topkd.compose.progress import Progress
from topkd.compose.run.observers import open_observers
from topkd.compose.run.run import RunResult, open_run
from topkd.compose.run.runner import TrainingParts, load_student, run_training
from topkd.compose.run.sampler import open_sampler
from topkd.compose.run.signals import StopSignals
from topkd.compose.teachers.open import open_teachers
from topkd.engine.config.objectives import CustomObjective
from topkd.topk.errors import ConfigError

if TYPE_CHECKING:
    from topkd.engine.learner.token_view import TokenLoss

__all__ = ["RunResult", "train"]


async def train(
    config: RunConfig,
    out: str | Path,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    signals: StopSignals | None = None,
    loss: TokenLoss | None = None,
) -> RunResult:
    """Train a student from one config; the run folder ``out`` holds everything about it.

    With ``[cache]``, every score and rollout is stored in the cache. What it holds is not requested again, and
    ``replay`` can repeat the run without a server.

    Args:
        config: Settings of the run.
        out: The run's folder.
        progress: Shows notes and records.
        resume: Whether to continue the run in ``out``.
        signals: Signals on which the run saves a checkpoint and ends; it can be resumed.
        loss: A custom objective that replaces the config's: it computes the loss of each token from a ``TokenView``.
    """
    if loss is not None:
        config = _record_loss(config, loss)
    else:
        loss = load_loss(config.objective)
    async with open_run(config, out, command="train", resume=resume, progress=progress, signals=signals) as run:
        if run.is_finished:
            return run.result()
        findings = await preflight(
            Preflight(
                config,
                run.progress,
                teachers_file=run.out / TEACHERS,
                is_resumed=run.previous.resumed,
                ranks=run.ranks,
                loss=loss,
            )
        )
        prompts = findings.loaded_prompts
        student = load_student(config, prompts)
        cache = run.enter(open_cache(config.cache))
        sampling = await run.enter_async(open_sampler(config, student, prompts, run))
        teachers = await run.enter_async(open_teachers(config, student, sampling.lock, cache))
        observers = await run.enter_async(open_observers(config, student, findings, teachers, run))
        parts = TrainingParts.of_run_file(config, student, findings, teachers, sampling=sampling, observers=observers)
        if cache is not None:
            recorded = cache.record_rollouts(sampling.sampler, config, student, prompts.rows, loss)
            parts = replace(parts, sampling=sampling.drawing_from(recorded), is_remembered=True, account=cache.account)
        return await run_training(run, replace(parts, loss=loss))


def _record_loss(config: RunConfig, loss: TokenLoss) -> RunConfig:
    """Return the config with the name of ``loss`` as its objective, for the run log."""
    if config.objective.is_data_only:
        raise ConfigError(
            "a custom loss needs a teacher", got=f'objective.kind = "{config.objective.name}"',
            hint="remove [objective] from the config",
        )  # fmt: skip
    return config.model_copy(update={"objective": CustomObjective.of_function(loss, config.objective)})
