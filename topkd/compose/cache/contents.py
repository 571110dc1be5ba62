"""A cache as a replay sees it: whose rollouts and scores; what it lacks is said before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from topkd.compose.cache.identity import GIVEN, build_served_identity, check_off_policy, is_off_policy, list_identities
from topkd.compose.cache.rollouts import choose_policy
from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import TeacherConfig
from topkd.engine.loop.data_mixing import count_on_policy_prompts
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.store.records import SCORE
from topkd.topk.errors import CacheMissError, ConfigError


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """What a run file finds in a cache.

    Attributes:
        policy: Whose rollouts are replayed.
        teachers: Whose scores, by the names of the run file.
    """

    policy: TeacherIdentity
    teachers: dict[str, TeacherIdentity]


def cache_folder(config: RunConfig, given: Path | None) -> Path:
    """The cache of a replay: the one that was named for it, or the run file's own."""
    if given is not None:
        return given
    if config.cache is None:
        raise ConfigError("no cache to replay", hint="give --cache DIR, or [cache] path in the config")
    return Path(config.cache.path)


def as_replayed(config: RunConfig) -> RunConfig:
    """The run's settings for a replay: one that may lack nothing loses no sample."""
    return config.model_copy(update={"max_lost_fraction": 0.0}) if config.replay.missing == "error" else config


def find_recorded_run(store: ScoreStore, config: RunConfig) -> RecordedRun:
    """What the cache has for this run file.

    Raises:
        CacheMissError: No rollouts, or no scores of these teachers that are as wide as K.
        ConfigError: It is not clear which are meant, or the objective cannot learn from them.
    """
    teachers = {name: _find_teacher(store, name, teacher, config) for name, teacher in config.teacher_map().items()}
    if not count_on_policy_prompts(config) and config.replay.policy is None and config.replay.order == "recorded":
        # Every completion comes with the data, in the order of the data: scores are all that is asked of the cache.
        return RecordedRun(TeacherIdentity(GIVEN, revision=Path(config.data.path).stem), teachers)
    policy = choose_policy(store.path, config.replay.policy)
    if is_off_policy(policy):
        if config.replay.order == "recorded":
            raise ConfigError(
                "completions that no recorded run drew have no recorded order", where=str(store.path),
                hint='set replay.order = "shuffled"',
            )  # fmt: skip
        check_off_policy(config, policy)
    return RecordedRun(policy, teachers)


def _find_teacher(store: ScoreStore, name: str, teacher: TeacherConfig, config: RunConfig) -> TeacherIdentity:
    """Whose scores to read: the config's teacher, or the only one of that revision in the cache."""
    found = list_identities(store.path, SCORE)
    where = f"{store.path}, teacher {name!r}" if name else str(store.path)
    shown = " or ".join(f"{one.name!r} (revision {one.revision!r}, {one.semantics})" for one in found)
    if teacher.kind == "server" and teacher.model is not None:
        named = build_served_identity(store, teacher.model, teacher.revision)
        fitting = [named] if named in found else []
        expected = f"{named.name!r} (revision {named.revision!r})"
    elif teacher.kind == "server":
        fitting = [one for one in found if one == TeacherIdentity(one.name, revision=teacher.revision)]
        expected = f"a teacher of revision {teacher.revision!r}"
    else:  # filed under the folder's name, and the hash of its weights unless told otherwise
        folder = Path(teacher.model or config.student.model).name + (" (self)" if teacher.kind == "self" else "")
        fitting = [one for one in found if one.name == folder and teacher.revision in {"", one.revision}]
        expected = f"{folder!r}" + (f" (revision {teacher.revision!r})" if teacher.revision else "")
    if not fitting:
        raise CacheMissError(
            "the cache holds no scores of this teacher", where=where, got=shown or "no scores at all",
            expected=expected, hint="set teacher.model and teacher.revision",
        )  # fmt: skip
    if len(fitting) > 1:
        raise ConfigError(
            "which teacher's scores?", where=where, got=shown, hint="set teacher.model and teacher.revision"
        )
    if found[fitting[0]] < config.k:
        raise CacheMissError(
            "the cache holds no scores as wide as this K", where=f"{where}, {fitting[0].name!r}",
            got=f"K {found[fitting[0]]} at most", expected=f"K {config.k}",
            hint=f"set k = {found[fitting[0]]}, or score again with --k {config.k}",
        )  # fmt: skip
    return fitting[0]
