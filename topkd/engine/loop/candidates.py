"""The teacher's rows on a list that the student has a say in: its own top-K, or both lists together."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from topkd.engine.config.objectives import Support
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import CandidateScorer, Ids, TeacherScorer
from topkd.topk.samples import Rollout
from topkd.topk.types import PAD_ID, Float32, Int32, TopK


def check_support(support: Support, teachers: Mapping[str, TeacherScorer]) -> None:
    """Raises ConfigError when a teacher cannot score ids of the student's choice, before anything is asked."""
    for name, teacher in teachers.items():
        if support != "teacher" and not isinstance(teacher, CandidateScorer):
            raise ConfigError(
                f"objective.support = {support!r} needs a teacher that scores chosen ids",
                where=f"teacher {name!r}" if name else "",
                got=type(teacher).__name__,
                expected="a dialect that scores candidates, and no [cache]: it keeps the teacher's own lists",
                hint='or set objective.support = "teacher"',
            )


async def move_to_support(teacher: TeacherScorer, ids: Ids, scores: TopK, rollout: Rollout, support: Support) -> TopK:
    """``scores`` with the list that ``support`` names in place of the teacher's own; the realised tokens stay."""
    if support == "teacher":
        return scores
    if rollout.topk is None:
        raise ConfigError(
            "a completion has no list of the student's, on which the teacher could be asked",
            expected=f"the sampler's top-K, for objective.support = {support!r}",
            hint="completions from the data have none: use on_policy_fraction = 1",
        )
    if not isinstance(teacher, CandidateScorer):
        raise ConfigError("the teacher scores no chosen ids", got=type(teacher).__name__)
    wanted = rollout.topk.ids
    return build_support_rows(scores, wanted, await teacher.score_candidates(ids, scores.start, wanted), support)


def build_support_rows(scores: TopK, wanted: Int32, values: Float32, support: Support) -> TopK:
    """The teacher's rows at the ids ``wanted`` [R, K] (-1 pads), whose logprobs are ``values``.

    For the union the ids that the teacher lists itself stay as they are, and the tail loses what the others add. The
    list never depends on the realised token: it may hold it only as one of the K best of either side.
    """
    new = wanted >= 0
    ids, logp = wanted, np.where(new, values, -np.inf).astype(np.float64)
    if support == "union":
        known = (wanted[:, :, None] == scores.ids[:, None, :]).any(axis=2)
        new &= ~known
        ids = np.concatenate([scores.ids, np.where(new, wanted, PAD_ID)], axis=1)
        logp = np.concatenate([scores.logp.astype(np.float64), np.where(new, logp, -np.inf)], axis=1)
    order = np.lexsort((-logp, ids < 0), axis=1)  # by logprob, pads behind an id whose probability is zero
    ids, logp = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logp, order, axis=1)
    # A hole stays a hole: a row that the teacher could not answer has no list to add to.
    hole = ~scores.signal
    rest = 1.0 - np.exp(logp).sum(axis=1)
    if support == "union":
        added = np.exp(np.where(new, values, -np.inf).astype(np.float64)).sum(axis=1)
        tail = np.exp(scores.tail_logp.astype(np.float64))
        rest = np.where(np.isnan(tail), rest, tail - added)  # the teacher's tail is of unrounded values
    with np.errstate(divide="ignore"):
        tail_logp = np.log(np.maximum(rest, 0.0))
    return TopK(
        scores.start,
        np.where(hole[:, None], PAD_ID, ids).astype(np.int32),
        np.where(hole[:, None], -np.inf, logp).astype(np.float32),
        scores.actual_ids,
        scores.actual_logp,
        np.where(hole, np.nan, tail_logp).astype(np.float32),
    )
