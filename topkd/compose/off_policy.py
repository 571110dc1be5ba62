"""Completions that the student did not draw, and the objectives that may learn from them."""

from __future__ import annotations

from topkd.engine import EngineConfig
from topkd.offline import TeacherIdentity
from topkd.topk.errors import ConfigError

GIVEN = "data"  # name of the policy of completions that came with a data file
_SAMPLED = "sampled"


def sampled_policy(teacher: TeacherIdentity) -> TeacherIdentity:
    """Whose rollouts a teacher's own completions are."""
    return TeacherIdentity(teacher.name, revision="-".join(part for part in (_SAMPLED, teacher.revision) if part))


def off_policy(policy: TeacherIdentity) -> bool:
    """True when a policy is no recorded run of a student."""
    return policy.name == GIVEN or policy.revision.partition("-")[0] == _SAMPLED


def check_off_policy(config: EngineConfig, policy: TeacherIdentity) -> None:
    """Raises ConfigError for an objective whose gradient would be that of nothing on another policy's completions.

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
            f"{objective.kind} with ppo cannot learn from completions that the student did not draw", where=where,
            got="ppo, which keeps the student near the policy that sampled: here that is not the student",
            expected='learner.importance.kind = "truncated"', hint=direct,
        )  # fmt: skip
    if importance == "none":
        raise ConfigError(
            f"{objective.kind} without importance weights takes every token for the student's own", where=where,
            expected='learner.importance.kind = "truncated"', hint=direct,
        )  # fmt: skip
    if getattr(objective, "gamma", 0.0) > 0.0:
        raise ConfigError(
            f"{objective.kind} with gamma above 0 adds up what follows a token", where=where,
            got="what follows was not drawn by the student", expected="objective.gamma = 0", hint=direct,
        )  # fmt: skip
