"""``replay``: the same engine over a cache, with no server at all."""

from __future__ import annotations

import contextlib
from pathlib import Path

from topkd.compose.config import RunConfig
from topkd.compose.feedback import feedback_context
from topkd.compose.identities import identities_with, served_identity
from topkd.compose.off_policy import check_off_policy, off_policy
from topkd.compose.pieces import load_pieces, load_prompts
from topkd.compose.progress import Progress
from topkd.compose.recorded import RecordedSampler, chosen_policy, policy_identity
from topkd.compose.resume import entered
from topkd.compose.running import RunResult, run
from topkd.compose.shuffled import ShuffledRollouts
from topkd.compose.stops import Stops
from topkd.compose.tables import TeacherConfig
from topkd.compose.watching import watching
from topkd.offline import ReplayScorer, ScoreStore, TeacherIdentity
from topkd.offline.records import SCORE
from topkd.topk.errors import CacheMissError, ConfigError


async def replay(
    config: RunConfig,
    out: Path,
    progress: Progress | None = None,
    *,
    cache: Path | None = None,
    resume: bool = False,
    stops: Stops | None = None,
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
    path = cache if cache is not None else Path(config.cache.path) if config.cache is not None else None
    if path is None:
        raise ConfigError("no cache to replay", hint="give --cache DIR, or [cache] path in the config")
    if config.replay.missing == "error":
        config = config.model_copy(update={"max_lost_fraction": 0.0})
    with ScoreStore(path) as store, contextlib.ExitStack() as stack:
        teachers = {
            name: ReplayScorer(store, _recorded_teacher(store, name, teacher, config))
            for name, teacher in config.teacher_map().items()
        }
        policy = chosen_policy(path, config.replay.policy)
        if off_policy(policy) and config.replay.order == "recorded":
            raise ConfigError(
                "completions that no recorded run drew have no recorded order", where=str(path),
                hint='set replay.order = "shuffled"',
            )  # fmt: skip
        if off_policy(policy):
            check_off_policy(config, policy)
        former, ranks = stack.enter_context(entered(out, config, progress, command="replay", resume=resume))
        if former.finished:
            return RunResult.of_finished(out, former)
        prompts = load_prompts(config, progress)
        pieces = load_pieces(config, progress, prompts)
        sampler = RecordedSampler(None, store, policy)
        asked = {name: teacher.identity for name, teacher in teachers.items()}
        itself = policy_identity(config, pieces.student, pieces.rows, asked) == policy
        source = None
        if config.replay.order == "shuffled":
            source = ShuffledRollouts(store, policy, pieces.rows, teachers=teachers, config=config, progress=progress)
        async with watching(
            _without_ceiling(config), student=pieces.student, prompts=prompts, models={}, teachers={}, out=out,
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
                context=feedback_context(config, prompts),
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


def _without_ceiling(config: RunConfig) -> RunConfig:
    """There is no teacher here that could answer for itself."""
    if config.eval is None or not config.eval.ceiling:
        return config
    return config.model_copy(update={"eval": config.eval.model_copy(update={"ceiling": False})})


def _recorded_teacher(store: ScoreStore, name: str, teacher: TeacherConfig, config: RunConfig) -> TeacherIdentity:
    """Whose scores to read: the config's teacher, or the only one of that revision in the cache."""
    path = store.path
    found = identities_with(path, SCORE)
    fitting = [one for one in found if one == TeacherIdentity(one.name, revision=teacher.revision)]
    if teacher.kind != "server":  # filed under the folder's name, and the hash of its weights unless told otherwise
        folder = Path(teacher.model or config.student.model).name + (" (self)" if teacher.kind == "self" else "")
        fitting = [one for one in found if one.name == folder and teacher.revision in {"", one.revision}]
    elif teacher.model is not None:
        return served_identity(store, teacher.model, teacher.revision)
    if len(fitting) == 1:
        return fitting[0]
    where = f"{path}, teacher {name!r}" if name else str(path)
    shown = " or ".join(f"{one.name!r} (revision {one.revision!r}, {one.semantics})" for one in found)
    if not fitting:
        raise CacheMissError(
            "the cache holds no scores of this teacher", where=where, got=shown or "no scores at all",
            expected=f"a teacher of revision {teacher.revision!r}", hint="set teacher.model and teacher.revision",
        )  # fmt: skip
    raise ConfigError("which teacher's scores?", where=where, got=shown, hint="set teacher.model and teacher.revision")
