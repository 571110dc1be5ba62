"""Feedback on the student's own attempt, put into the prompt of the teacher that scores that attempt (SDPO)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from topkd.compose.config.functions import load_function
from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.prompts import Prompts
from topkd.compose.data.rows import check_row, render_prompt
from topkd.engine.loop.prompts import PromptRow
from topkd.topk.errors import ConfigError, ContextLimitError
from topkd.topk.samples import Rollout


def build_feedback_context(config: RunConfig, prompts: Prompts) -> Callable[[PromptRow, Rollout], PromptRow] | None:
    """Return a function that adds feedback to a row's teacher prompt, given its completion; None without ``feedback``.

    ``[data] feedback`` is called with the row's columns and the completion's text, in its own thread. It must return
    the same text for the same arguments, or else the run cannot be repeated. If it returns None, nothing is added.
    """
    if config.data.feedback is None:
        return None
    name = config.data.feedback
    function = load_function(name, "data.feedback")

    def add_feedback(row: PromptRow, rollout: Rollout) -> PromptRow:
        completion = prompts.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
        where = f"{config.data.path}, {row.sample_id}"
        try:
            feedback = function(row.columns, completion)
        except Exception as error:
            raise ConfigError(
                "the feedback function failed", where=f"{name}; {where}", got=f"{type(error).__name__}: {error}"
            ) from error
        if feedback is None:
            return row
        if not isinstance(feedback, str):
            raise ConfigError("feedback must be text or None", where=f"{name}; {where}", got=type(feedback).__name__)
        data = check_row({key: value for key, value in row.columns.items() if key != "completion"}, where)
        if data.messages and data.messages[-1].get("role") == "assistant":
            data = data.model_copy(update={"messages": data.messages[:-1]})
        sides = prompts.readers.teachers or {}
        side = sides.get(row.teacher_id, prompts.readers.student)
        privileged = {**data.privileged, "feedback": feedback}
        ids = render_prompt(data, side, privileged, prompts.readers.privileged, where)
        if len(ids) > config.rollout.max_prompt_tokens:
            raise ContextLimitError(
                "the teacher's prompt with its feedback is too long", where=where, got=f"{len(ids)} tokens",
                expected=f"at most {config.rollout.max_prompt_tokens}", hint="raise rollout.max_prompt_tokens",
            )  # fmt: skip
        return replace(row, teacher_prompt_ids=np.array(ids))

    return add_feedback
