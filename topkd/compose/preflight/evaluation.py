"""Checks the measurements of an ``[eval]`` table before any model is loaded."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import EvalConfig
from topkd.compose.data.answer_scorers import AnswerScorer, load_answer_scorer
from topkd.compose.data.prompts import Readers, read_prompts
from topkd.engine.loop.prompts import PromptRow
from topkd.topk.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """The measurements of an evaluation, and the prompts to measure on.

    Attributes:
        table: The ``[eval]`` table.
        rows: Prompts to measure on.
        scorer: Grades an answer; None if answers are not graded.
        prefixes: Kinds of prefixes on which exact divergences are measured; may be empty.
        left_out: Teachers whose weights are not on this machine.
    """

    table: EvalConfig
    rows: list[PromptRow]
    scorer: AnswerScorer | None
    prefixes: tuple[str, ...]
    left_out: tuple[str, ...]


def plan_evaluation(config: RunConfig, table: EvalConfig, readers: Readers, local: AbstractSet[str]) -> EvalPlan:
    """Read the prompts of ``[eval]``; refuse a table that measures nothing, or whose scorer fails on the first row.

    ``local`` are the names of the teachers whose weights are on this machine.
    """
    rows, _ = read_prompts(
        Path(table.path), readers, max_tokens=config.rollout.max_prompt_tokens, overlong="error", limit=table.limit
    )
    if table.teacher is not None:
        if len(config.teacher_map()) > 1:
            raise ConfigError("eval.teacher is one folder, and the run has several teachers", got=table.teacher)
        local = config.teacher_map().keys()
    names = {row.teacher_id for row in rows}
    is_measured = bool(table.prefixes and names & local)
    scorer = None if table.scorer is None else load_answer_scorer(table.scorer)
    if not is_measured and scorer is None:
        raise ConfigError(
            "[eval] has nothing to measure", got="no scorer, and no teacher's weights on this machine",
            hint="set eval.scorer, or eval.teacher to the teacher's folder",
        )  # fmt: skip
    if table.best not in {None, "accuracy"} and not is_measured:
        raise ConfigError(f"eval.best = {table.best!r} needs the teacher's weights", hint="set eval.teacher")
    if scorer is not None and rows:
        score_answer(scorer, rows[0], "", table.path)  # a file without answers is refused before the first step
    prefixes = table.prefixes if is_measured else ()
    return EvalPlan(table, rows, scorer, prefixes, tuple(sorted(names - local)) if is_measured else ())


def score_answer(scorer: AnswerScorer, row: PromptRow, text: str, where: str) -> float:
    """Grade one completion; an error names the row of the data file ``where``."""
    try:
        return scorer(row.columns, text)
    except DataError as error:
        raise DataError(
            error.what, where=f"{where}, {row.sample_id}", got=error.got, expected=error.expected, hint=error.hint
        ) from error
