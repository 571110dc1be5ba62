"""What a student wrote at the beginning and at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from topkd.report.load.run_folder import DEMO
from topkd.report.load.run_log import LoggedRun, Record, read_object
from topkd.topk.errors import DataError

_PROMPT_CHARS, _TEXT_CHARS = 400, 800


@dataclass(frozen=True, slots=True)
class ExampleCompletion:
    """A text that a model wrote to a prompt, under a title."""

    title: str
    prompt: str
    text: str


def read_completions(run: LoggedRun) -> list[ExampleCompletion]:
    """Read what the student wrote first and last; empty where that was not recorded, or the student wrote nothing."""
    if (run.path / DEMO).exists():
        try:
            return _read_demo(read_object(run.path / DEMO))
        except DataError:  # empty until the demo ends
            return []
    rollouts = [rollout for rollout in run.rollouts if isinstance(rollout.get("step"), int)]
    if run.foreign or not rollouts:
        return []
    first, last = _choose_pair(rollouts)
    return [_build_completion(rollout) for rollout in ([first] if first["step"] == last["step"] else [first, last])]


def _read_demo(summary: Record) -> list[ExampleCompletion]:
    titles = {
        "student before": "Student, before training",
        "student after": "Student, after training",
        "teacher": "Teacher",
    }
    prompt = str(summary.get("prompt", ""))
    return [ExampleCompletion(title, prompt, str(summary[key])) for key, title in titles.items() if key in summary]


def _choose_pair(rollouts: Sequence[Record]) -> tuple[Record, Record]:
    """Choose a rollout of the first and one of the last recorded step: of one prompt, where both steps have it."""
    firsts = [rollout for rollout in rollouts if rollout["step"] == rollouts[0]["step"]]
    lasts = [rollout for rollout in rollouts if rollout["step"] == rollouts[-1]["step"]]
    pairs = ((first, last) for first in firsts for last in lasts if first.get("prompt") == last.get("prompt"))
    return next(pairs, (firsts[0], lasts[-1]))


def _build_completion(rollout: Record) -> ExampleCompletion:
    prompt = str(rollout.get("prompt", ""))
    text = "".join(str(token.get("text", "")) for token in rollout["tokens"] if isinstance(token, dict))
    cut = "…" if len(text) > _TEXT_CHARS or rollout.get("left_out") else ""
    return ExampleCompletion(
        f"Student, at step {rollout['step']}",
        f"…{prompt[-_PROMPT_CHARS:]}" if len(prompt) > _PROMPT_CHARS else prompt,
        text[:_TEXT_CHARS] + cut,
    )
