"""Finds the rollouts and scores in a cache that a replay reads, before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from topkd.compose.cache.identity import GIVEN, build_served_identity, check_off_policy, is_off_policy, list_identities
from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import TeacherConfig
from topkd.engine.loop.data_mixing import count_on_policy_prompts
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.store.records import ROLLOUT, SCORE
from topkd.topk.errors import CacheMissError, ConfigError


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The rollouts and scores in a cache that fit a run file.

    Attributes:
        policy: The policy that sampled the rollouts.
        teachers: The teachers that gave the scores, by their names in the run file.
    """

    policy: TeacherIdentity
    teachers: dict[str, TeacherIdentity]


def cache_folder(config: RunConfig, chosen: Path | None) -> Path:
    """Return the folder of a replay's cache: ``chosen``, or the run file's."""
    if chosen is not None:
        return chosen
    if config.cache is None:
        raise ConfigError("no cache to replay", hint="give --cache DIR, or [cache] path in the config")
    return Path(config.cache.path)


def as_replayed(config: RunConfig) -> RunConfig:
    """Return the run's settings for a replay: with ``replay.missing = "error"``, no sample may be lost."""
    return config.model_copy(update={"max_lost_fraction": 0.0}) if config.replay.missing == "error" else config


def find_recorded_run(store: ScoreStore, config: RunConfig) -> RecordedRun:
    """Find the rollouts and scores for this run file.

    Raises:
        CacheMissError: The cache has no rollouts, or no scores of these teachers with K entries.
        ConfigError: Several fit, or the objective cannot learn from them.
    """
    teachers = {name: _find_teacher(store, name, teacher, config) for name, teacher in config.teacher_map().items()}
    if not count_on_policy_prompts(config) and config.replay.policy is None and config.replay.order == "recorded":
        # Every completion comes from the data, in its order: only scores are read from the cache.
        return RecordedRun(TeacherIdentity(GIVEN, revision=Path(config.data.path).stem), teachers)
    policy = _choose_policy(store.path, config.replay.policy)
    if is_off_policy(policy):
        if config.replay.order == "recorded":
            raise ConfigError(
                "these completions are not from a recorded run, so they have no recorded order", where=str(store.path),
                hint='set replay.order = "shuffled"',
            )  # fmt: skip
        check_off_policy(config, policy)
    return RecordedRun(policy, teachers)


def _find_teacher(store: ScoreStore, name: str, teacher: TeacherConfig, config: RunConfig) -> TeacherIdentity:
    """Find the teacher whose scores to read: the config's, or the only one of that revision in the cache."""
    found = list_identities(store.path, SCORE)
    where = f"{store.path}, teacher {name!r}" if name else str(store.path)
    shown = " or ".join(f"{who.name!r} (revision {who.revision!r}, {who.semantics})" for who in found)
    if teacher.kind == "server" and teacher.model is not None:
        named = build_served_identity(store, teacher.model, teacher.revision)
        fitting = [named] if named in found else []
        expected = f"{named.name!r} (revision {named.revision!r})"
    elif teacher.kind == "server":
        fitting = [who for who in found if who == TeacherIdentity(who.name, revision=teacher.revision)]
        expected = f"a teacher of revision {teacher.revision!r}"
    else:  # its scores are stored under the folder's name and a revision, by default the hash of its weights
        folder = Path(teacher.model or config.student.model).name + (" (self)" if teacher.kind == "self" else "")
        fitting = [who for who in found if who.name == folder and teacher.revision in {"", who.revision}]
        expected = f"{folder!r}" + (f" (revision {teacher.revision!r})" if teacher.revision else "")
    if not fitting:
        raise CacheMissError(
            "the cache holds no scores of this teacher", where=where, got=shown or "no scores at all",
            expected=expected, hint="set teacher.model and teacher.revision",
        )  # fmt: skip
    if len(fitting) > 1:
        raise ConfigError(
            "several teachers in the cache fit", where=where, got=shown, hint="set teacher.model and teacher.revision"
        )
    if found[fitting[0]] < config.k:
        raise CacheMissError(
            "the cache holds no scores with K entries", where=f"{where}, {fitting[0].name!r}",
            got=f"at most {found[fitting[0]]} entries", expected=f"K = {config.k}",
            hint=f"set k = {found[fitting[0]]}, or score again with --k {config.k}",
        )  # fmt: skip
    return fitting[0]


def _choose_policy(path: Path, revision: str | None) -> TeacherIdentity:
    """Choose the policy to replay: the one of that revision, or the cache's only one."""
    found = list_identities(path, ROLLOUT)
    chosen = [policy for policy in found if revision is None or policy.revision == revision]
    if not found:
        raise CacheMissError(
            "the cache holds no rollouts",
            where=str(path),
            hint="record a run with [cache], or score rows with logp; to replay scores of the data's completions only, "
            'set on_policy_fraction = 0, data_loss = "objective" and a direct objective such as kd',
        )
    if len(chosen) != 1:
        raise ConfigError(
            "the cache holds several recorded runs" if revision is None else "no recorded run has this revision",
            where=str(path), got=revision or f"{len(chosen)} runs",
            expected="replay.policy = " + " or ".join(repr(policy.revision) for policy in found),
        )  # fmt: skip
    return chosen[0]
