"""Names under which a cache files scores and rollouts; one for all the ways to write the path of a folder."""

from __future__ import annotations

import posixpath
from dataclasses import replace
from pathlib import Path

import numpy as np

from topkd.engine import EngineConfig
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.store.records import IDENTITY
from topkd.offline.store.tables import close_segments, read_tables, read_teachers
from topkd.topk.errors import ConfigError


def normalize_served_name(name: str) -> str:
    """Write a served name in one spelling.

    Servers call a model by the path it was started with: ``./models/teacher/`` and ``models/teacher`` are one folder.
    Where a relative path begins only the server knows, so nothing more is made equal.
    """
    if not name.strip() or "://" in name:
        return name  # refused where it becomes an identity
    return posixpath.normpath(name)


def build_served_identity(store: ScoreStore, name: str, revision: str = "") -> TeacherIdentity:
    """Name a server as this cache knows it.

    A cache that was begun under another spelling of the name goes on under it: what was paid for stays found.

    Args:
        store: Where the scores are, or will be.
        name: As the server, or the user, says it.
        revision: Of the weights behind it.
    """
    wanted = TeacherIdentity(normalize_served_name(name), revision=revision)
    if not revision and not wanted.name.strip("./"):
        raise ConfigError(
            "a served name that says nothing of the model", got=repr(name),
            hint="name its weights with a revision, or serve it under a name of its own",
        )  # fmt: skip
    stored = {record.identity() for record in store.records(kinds=(IDENTITY,), live=False)}
    spelt = [who for who in stored if replace(who, name=normalize_served_name(who.name)) == wanted]
    return wanted if wanted in spelt or not spelt else min(spelt, key=TeacherIdentity.to_json)


def list_identities(path: Path, kind: int) -> dict[TeacherIdentity, int]:
    """List whose records of a kind a cache holds, each with the widest K of them."""
    segments, table = read_tables(path)
    try:
        names, rows = read_teachers(segments, table), table[table["kind"] == kind]
        tags = [tag for tag in np.unique(rows["tag"]).tolist() if tag in names]
        widest = {names[tag]: int(rows["asked"][rows["tag"] == tag].max()) for tag in tags}
        return dict(sorted(widest.items(), key=lambda item: item[0].to_json()))
    finally:
        close_segments(segments)


GIVEN = "data"  # name of the policy of completions that came with a data file
_SAMPLED = "sampled"


def build_sampled_policy(teacher: TeacherIdentity) -> TeacherIdentity:
    """Name the policy of a teacher's own completions."""
    return TeacherIdentity(teacher.name, revision="-".join(part for part in (_SAMPLED, teacher.revision) if part))


def is_off_policy(policy: TeacherIdentity) -> bool:
    """Return whether a policy is no recorded run of a student."""
    return policy.name == GIVEN or policy.revision.partition("-")[0] == _SAMPLED


def check_off_policy(config: EngineConfig, policy: TeacherIdentity) -> None:
    """Refuse an objective that cannot learn from completions of another policy.

    A loss on the teacher's list is defined on any text. A policy gradient takes its tokens from the student: drawn by
    another, each needs the weight student over sampler, and a return needs a product of such weights that nobody takes.
    """
    objective, importance = config.objective, config.learner.importance.kind
    if not objective.needs_behavior:
        return
    where = f"policy {policy.revision!r}"
    direct = "objective fkl, rkl, gjs_direct, kd, taid or entropy_aware learn from any text"
    if importance == "ppo":
        raise ConfigError(
            f"{objective.name} with ppo cannot learn from completions that the student did not draw", where=where,
            got="ppo, which keeps the student near the policy that sampled: here that is not the student",
            expected='learner.importance.kind = "truncated"', hint=direct,
        )  # fmt: skip
    if importance == "none":
        raise ConfigError(
            f"{objective.name} without importance weights takes every token for the student's own", where=where,
            expected='learner.importance.kind = "truncated"', hint=direct,
        )  # fmt: skip
    if objective.sums_returns:
        raise ConfigError(
            f"{objective.name} with gamma above 0 adds up what follows a token", where=where,
            got="what follows was not drawn by the student", expected="objective.gamma = 0", hint=direct,
        )  # fmt: skip
