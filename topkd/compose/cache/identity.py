"""Identities (model name and revision) under which a cache stores scores and rollouts."""

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
    """Normalise a model name that is a path.

    Servers name a model by the path that they were started with: ``./models/teacher/`` and ``models/teacher`` are one
    folder. Only the server knows its working directory, so a relative and an absolute path stay different.
    """
    if not name.strip() or "://" in name:
        return name  # TeacherIdentity refuses it
    return posixpath.normpath(name)


def build_served_identity(store: ScoreStore, name: str, revision: str = "") -> TeacherIdentity:
    """Build the identity of a server's model in this cache.

    If the cache has scores under another spelling of the name, that spelling is used, so that they are found.

    Args:
        store: The cache.
        name: Model name, from the server or from the user.
        revision: Revision of the model's weights.
    """
    wanted = TeacherIdentity(normalize_served_name(name), revision=revision)
    if not revision and not wanted.name.strip("./"):
        raise ConfigError(
            "the model name does not identify the model", got=repr(name),
            hint="give a revision of the weights, or serve the model under a distinct name",
        )  # fmt: skip
    stored = {record.identity() for record in store.records(kinds=(IDENTITY,), live=False)}
    spelt = [who for who in stored if replace(who, name=normalize_served_name(who.name)) == wanted]
    return wanted if wanted in spelt or not spelt else min(spelt, key=TeacherIdentity.to_json)


def list_identities(path: Path, kind: int) -> dict[TeacherIdentity, int]:
    """List the identities that have records of a kind in a cache, each with its largest K."""
    segments, table = read_tables(path)
    try:
        names, rows = read_teachers(segments, table), table[table["kind"] == kind]
        tags = [tag for tag in np.unique(rows["tag"]).tolist() if tag in names]
        widest = {names[tag]: int(rows["asked"][rows["tag"] == tag].max()) for tag in tags}
        return dict(sorted(widest.items(), key=lambda item: item[0].to_json()))
    finally:
        close_segments(segments)


GIVEN = "data"  # name of the policy for completions from a data file
_SAMPLED = "sampled"


def build_sampled_policy(teacher: TeacherIdentity) -> TeacherIdentity:
    """Build the policy identity for completions that a teacher sampled."""
    return TeacherIdentity(teacher.name, revision="-".join(part for part in (_SAMPLED, teacher.revision) if part))


def is_off_policy(policy: TeacherIdentity) -> bool:
    """Return whether a policy is something else than a recorded run of a student."""
    return policy.name == GIVEN or policy.revision.partition("-")[0] == _SAMPLED


def check_off_policy(config: EngineConfig, policy: TeacherIdentity) -> None:
    """Refuse an objective that cannot learn from completions of another policy.

    A direct loss is defined on any text. A policy gradient needs tokens that the student sampled. If another policy
    sampled them, each needs the weight student / sampler, and a return needs products of them, which are not computed.
    """
    objective, importance = config.objective, config.learner.importance.kind
    if not objective.needs_behavior:
        return
    where = f"policy {policy.revision!r}"
    direct = "the objectives fkl, rkl, gjs_direct, kd, taid and entropy_aware can learn from any text"
    if importance == "ppo":
        raise ConfigError(
            f"{objective.name} with ppo cannot learn from completions that the student did not sample", where=where,
            got="ppo, which keeps the student near the policy that sampled; here that is another model",
            expected='learner.importance.kind = "truncated"', hint=direct,
        )  # fmt: skip
    if importance == "none":
        raise ConfigError(
            f"{objective.name} without importance weights treats every token as the student's", where=where,
            expected='learner.importance.kind = "truncated"', hint=direct,
        )  # fmt: skip
    if objective.sums_returns:
        raise ConfigError(
            f"{objective.name} with gamma above 0 needs completions that the student sampled", where=where,
            got="completions of another policy", expected="objective.gamma = 0", hint=direct,
        )  # fmt: skip
