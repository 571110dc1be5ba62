"""Turn rollouts into prepared samples: one teacher call each, concurrently; lost samples are counted by reason."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from topkd.engine.config.objectives import Support
from topkd.engine.loop.data_mixing import build_core
from topkd.engine.loop.prompts import PromptRow
from topkd.topk.errors import (
    CacheMissError,
    ConfigError,
    ContextLimitError,
    ResponseError,
    RetryableServerError,
    TopkdError,
)
from topkd.topk.protocols import CandidateScorer, Ids, TeacherScorer
from topkd.topk.samples import (
    PreparedSample,
    Rollout,
    ScalarBehavior,
    TopKBehavior,
    TopKPreparedSample,
)
from topkd.topk.types import PAD_ID, Float32, Int32, TopK

Context: TypeAlias = Callable[[PromptRow, Rollout], PromptRow]

# Errors that lose one sample without ending the run: they concern this one request. An error that every request would
# get (K limit, authentication, no such model) is raised.
LOSABLE = (RetryableServerError, ResponseError, ContextLimitError)


@dataclass(slots=True)
class ScoredBatch:
    """The samples of one step, and the number of lost ones by reason."""

    samples: list[PreparedSample] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    first_error: TopkdError | None = None
    truncated: int = 0

    @property
    def total(self) -> int:
        """The number of samples, lost ones included."""
        return len(self.samples) + self.lost.total()


def find_teacher(teachers: Mapping[str, TeacherScorer], teacher_id: str) -> TeacherScorer:
    """Find the teacher that a row names; refuse an unknown name."""
    try:
        return teachers[teacher_id]
    except KeyError:
        raise ConfigError(f"no teacher named {teacher_id!r}", expected=f"one of {sorted(teachers)}") from None


async def score_rollouts(
    rows: Sequence[PromptRow],
    rollouts: Sequence[Rollout],
    teachers: Mapping[str, TeacherScorer],
    k: int,
    *,
    truncated: Literal["keep", "mask"] = "keep",
    context: Context | None = None,
    support: Support = "teacher",
) -> ScoredBatch:
    """Score every rollout (``rows[i]`` is the prompt of ``rollouts[i]``), concurrently, keeping their order.

    Args:
        rows: A row for each rollout.
        rollouts: The student's completions.
        teachers: teacher_id -> scorer.
        k: Entries of each list.
        truncated: "mask" trains on no token of a completion that was cut at its token limit.
        context: Called in a thread with each row and its rollout: returns the row as the teacher is to see it, when
            that depends on the completion.
        support: Whose list of ids the scores use; the student's comes with its rollouts.
    """

    async def score_rollout(row: PromptRow, rollout: Rollout) -> PreparedSample | TopkdError:
        if rollout.finish_reason == "abort":
            return ResponseError("the sampler aborted the completion")
        if not rollout.completion_ids.size:
            return ResponseError("the sampler returned an empty completion", where=f"row {row.sample_id or '?'}")
        try:
            seen = row if context is None else await asyncio.to_thread(context, row, rollout)
            trains = truncated == "keep" or rollout.finish_reason != "length"
            teacher = find_teacher(teachers, row.teacher_id)
            return await _prepare_sample(seen, rollout, teacher, k, support=support, trains=trains)
        except (*LOSABLE, CacheMissError) as error:  # a replay does not find what the recorded run had lost
            return error

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(score_rollout(row, rollout)) for row, rollout in zip(rows, rollouts, strict=True)]
    batch = ScoredBatch(truncated=sum(rollout.finish_reason == "length" for rollout in rollouts))
    for outcome in (task.result() for task in tasks):
        if isinstance(outcome, TopkdError):
            batch.lost[type(outcome).__name__] += 1
            batch.first_error = batch.first_error or outcome
        else:
            batch.samples.append(outcome)
    return batch


async def _prepare_sample(
    row: PromptRow, rollout: Rollout, teacher: TeacherScorer, k: int, *, support: Support, trains: bool
) -> PreparedSample:
    start, ids = row.teacher_prompt_ids.size - 1, np.concatenate([row.teacher_prompt_ids, rollout.completion_ids])
    scores = await move_to_support(teacher, ids, await teacher.score(ids, start, k), rollout, support)
    core = build_core(row, rollout, trains=trains)
    behavior = ScalarBehavior(rollout.logp) if rollout.topk is None else TopKBehavior(rollout.logp, rollout.topk)
    return TopKPreparedSample(core, behavior, scores)


def summarize_scores(batch: ScoredBatch) -> dict[str, Any]:
    """Summarise one process's share of a step for ``compute_teacher_metrics``."""
    topks = [sample.teacher for sample in batch.samples if isinstance(sample, TopKPreparedSample)]
    masses = [topk.mass()[topk.signal].astype(np.float64) for topk in topks]  # a hole has no mass, not mass 0
    tails = [np.exp(tail[~np.isnan(tail)]) for tail in (topk.tail_logp.astype(np.float64) for topk in topks)]
    return {
        "samples": len(batch.samples),
        "lost": dict(batch.lost),
        "truncated": batch.truncated,
        "completion_tokens": sum(topk.rows for topk in topks),
        "mass": sum(float(mass.sum()) for mass in masses),
        "signal": sum(mass.size for mass in masses),
        "tail": sum(float(tail.sum()) for tail in tails),
        "tails": sum(tail.size for tail in tails),
        "inside": sum(int((topk.ids == topk.actual_ids[:, None]).any(axis=1).sum()) for topk in topks),
        "missing": sum(int(np.isnan(topk.actual_logp).sum()) for topk in topks),
        "without_signal": sum(int((~topk.signal).sum()) for topk in topks),
    }


def compute_teacher_metrics(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute a step's score statistics over all processes: mass inside and outside the lists, holes, and so on."""
    lost: Counter[str] = Counter()
    for share in facts:
        lost.update(share["lost"])
    total = {name: sum(share[name] for share in facts) for name in facts[0] if name != "lost"}
    account: dict[str, Any] = {
        "samples": total["samples"],
        "lost": dict(lost),
        "truncated": total["truncated"],
        "completion_tokens": total["completion_tokens"],
    }
    if asked := total["samples"] + lost.total():
        account["truncation_rate"] = total["truncated"] / asked
    if rows := total["completion_tokens"]:
        account |= {
            "teacher_mass": total["mass"] / total["signal"] if total["signal"] else float("nan"),
            "tail_mass": total["tail"] / total["tails"] if total["tails"] else float("nan"),
            "realised_in_topk": total["inside"] / rows,
            "missing_tokens": total["missing"],
            "rows_without_signal": total["without_signal"],
        }
    return account


def check_support(support: Support, teachers: Mapping[str, TeacherScorer]) -> None:
    """Refuse a teacher that cannot score chosen ids, if ``support`` needs that."""
    for name, teacher in teachers.items():
        if support != "teacher" and not isinstance(teacher, CandidateScorer):
            raise ConfigError(
                f"objective.support = {support!r} needs a teacher that scores chosen ids",
                where=f"teacher {name!r}" if name else "",
                got=type(teacher).__name__,
                expected="a dialect that scores candidates, and no [cache], which stores only the teacher's own lists",
                hint='or set objective.support = "teacher"',
            )


async def move_to_support(teacher: TeacherScorer, ids: Ids, scores: TopK, rollout: Rollout, support: Support) -> TopK:
    """Return the teacher's rows with the lists that ``support`` names; the realised tokens stay the same."""
    if support == "teacher":
        return scores
    if rollout.topk is None:
        raise ConfigError(
            "the completion has no top-K list of the student for the teacher to score",
            expected=f"the sampler's top-K, for objective.support = {support!r}",
            hint="completions from the data have none: use on_policy_fraction = 1",
        )
    if not isinstance(teacher, CandidateScorer):
        raise ConfigError("the teacher cannot score chosen ids", got=type(teacher).__name__)
    wanted = rollout.topk.ids
    return build_support_rows(scores, wanted, await teacher.score_candidates(ids, scores.start, wanted), support)


def build_support_rows(scores: TopK, wanted: Int32, values: Float32, support: Support) -> TopK:
    """Build the teacher's rows at the ids ``wanted`` [R, K] (-1 pads), whose logprobs are ``values``.

    In a union the teacher's own entries stay as they are, and the mass of the added ids is taken from the tail. The
    list never depends on the realised token, which is in it only if it is among the K best of one side.
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
    # A hole stays a hole: ids are not added to a row without a teacher's list.
    hole = ~scores.signal
    rest = 1.0 - np.exp(logp).sum(axis=1)
    if support == "union":
        added = np.exp(np.where(new, values, -np.inf).astype(np.float64)).sum(axis=1)
        tail = np.exp(scores.tail_logp.astype(np.float64))
        rest = np.where(np.isnan(tail), rest, tail - added)  # the teacher's tail comes from unrounded values
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
