"""Progress of a command: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from topkd.compose.progress import Progress as RunProgress

if TYPE_CHECKING:
    from topkd.compose.train import RunResult

_PLAIN_EVERY_S = 10.0
_MEASURES = {"kl_k1": "kl", "sft_loss": "-log p", "loss": "loss"}  # field of a step, and its name in the line


class Display(RunProgress):
    """Shows the progress of a command: a live bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.live = self.console.is_terminal and not os.environ.get("CI")
        self._bars = Progress(
            # In 80 columns the bar is shortened first, then the detail; the clocks are never cut.
            TextColumn("{task.description}"),
            BarColumn(bar_width=16, table_column=Column(max_width=16)),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[detail]}", markup=False),  # an error may contain brackets
            console=self.console,
            disable=not self.live,
        )
        self._task: TaskID | None = None
        self._name, self._total, self._printed_at, self._began = "", 0, 0.0, time.monotonic()
        self._first: tuple[int, float] | None = None  # units and time at the stage's first report

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of ``total`` units."""
        self._name, self._total, self._printed_at, self._first = name, total, 0.0, None
        self._task = self._bars.add_task(name, total=total, detail="")

    def advance(self, done: int, detail: str = "") -> None:
        """Show that ``done`` units of the current stage are finished."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        if self.live and self._task is not None:
            self._bars.update(self._task, completed=done, detail=detail)
        elif done == self._total or now - self._printed_at > _PLAIN_EVERY_S:
            self._printed_at = now
            clock = f"{now - self._began:.0f} s{format_eta(*self._first, done, self._total, now)}"
            self.note(f"{self._name}: {done}/{self._total} {detail} ({clock})")

    def record(self, kind: str, record: dict[str, Any]) -> None:
        """Show a step on the bar, and an evaluation on a line of its own."""
        if kind == "eval":
            self.note(f"step {record['step']:>4}: {format_evaluation(record)}")
            return
        seconds = record["sample_s"] + record["score_wait_s"] + record["learn_s"]
        detail = f"{format_step(record)}  {record['tokens'] / max(seconds, 1e-9):.0f} tok/s"
        if record["lost"]:
            detail += f"  lost {sum(record['lost'].values())}"
        self.advance(record["step"], detail)


def format_eta(first: int, since: float, done: int, total: int, now: float) -> str:
    """Format the time that a stage still needs at its speed so far; "" if it is unknown."""
    if done <= first or done >= total:
        return ""
    seconds = (now - since) / (done - first) * (total - done)
    return f", about {seconds:.0f} s left" if seconds < 120 else f", about {seconds / 60:.0f} min left"


def format_step(record: dict[str, Any]) -> str:
    """Format the main measure of a step."""
    measure = _find_measure(record)
    return "no signal" if measure is None else f"{_MEASURES[measure]} {record[measure]:.3f}"


def _find_measure(record: dict[str, Any]) -> str | None:
    """Find the first measure that a step has: sampled KL, likelihood of the data, or the loss on the teacher's lists.

    Imported lists do not have the logprob of a token outside them, so that a step may have no sampled KL.
    """
    listed = not math.isnan(record.get("teacher_mass") or math.nan)
    return next((name for name in _MEASURES if record.get(name) is not None and (name != "loss" or listed)), None)


def format_evaluation(record: dict[str, Any]) -> str:
    """Format an evaluation in one line: what was measured, and on which prefixes."""
    parts = []
    if "accuracy" in record:
        ceiling = f" (teacher {100 * record['teacher_accuracy']:.1f} %)" if "teacher_accuracy" in record else ""
        parts.append(f"accuracy {100 * record['accuracy']:.1f} %{ceiling}")
    if "reverse_kl" in record:
        where = {"fresh": "fresh", "teacher": "teacher's"}.get(record.get("prefixes", "fixed"), "held-out")
        parts.append(
            f"{where} KL(S||T) {record['reverse_kl']:.4f}  KL(T||S) {record['forward_kl']:.4f}  "
            f"agreement {100 * record['agreement']:.1f} %"
        )
    return "  ".join(parts)


def print_result(result: RunResult, verb: str, *, as_json: bool) -> None:
    """Print the result of a finished run and its files: in the words of its report, or as strict JSON."""
    from topkd.engine.loop.metrics import make_strict_json
    from topkd.report.analysis.verdict import judge_folder

    last = result.steps[-1]
    if as_json:
        typer.echo(json.dumps(make_strict_json({"out": str(result.out), "last_step": last, "evals": result.evals})))
        return
    verdict = judge_folder(result.out)
    if verdict.summary:
        typer.echo(verdict.summary)
    typer.echo(
        f"{last['step']} step{'s' * (last['step'] != 1)} {verb}; {verdict.headline}; "
        f"student: {result.out / 'student'}, run log: {result.out / 'metrics.jsonl'}\n"
        f"report: topkd report {shlex.quote(str(result.out))}"
    )
