"""Observers of a run: its evaluation and its trackers, opened together and called with the same records."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import TrackConfig
from topkd.compose.preflight.preflight import Preflight
from topkd.compose.run.run import Run
from topkd.compose.teachers.open import Teachers
from topkd.topk.errors import ConfigError


def _ignore_record(kind: str, record: dict[str, Any]) -> None:
    """Do nothing: the run has no trackers."""


@dataclass(frozen=True, slots=True)
class Observers:
    """Hooks that observe a run and do not change it.

    Attributes:
        evaluate: Measures the student; None without ``[eval]``.
        on_record: Called with every run log record.
    """

    evaluate: Callable[[], dict[str, Any] | list[dict[str, Any]]] | None = None
    on_record: Callable[[str, dict[str, Any]], None] = _ignore_record


@contextlib.asynccontextmanager
async def open_observers(
    config: RunConfig, student: Any, findings: Preflight, teachers: Teachers, run: Run
) -> AsyncIterator[Observers]:
    """Open evaluation and trackers, and measure the teacher's own accuracy; on the first rank only."""
    if not run.is_first_rank:
        yield Observers()
        return
    step = run.previous.step
    evaluation = None
    if findings.evaluation is not None:
        from topkd.compose.run.evaluation import Evaluation

        tokenizer = findings.loaded_prompts.tokenizer
        evaluation = Evaluation(
            config, findings.evaluation, student=student, tokenizer=tokenizer, models=teachers.models, out=run.out
        )
        evaluation.step = step
        await evaluation.measure_ceiling(teachers.servers, run.progress)
    resumed = step if run.previous.resumed else None
    settings = config.model_dump(mode="json")
    with contextlib.closing(Tracking(config.track, run.out, settings, resume_step=resumed)) as tracking:

        def on_record(kind: str, record: dict[str, Any]) -> None:
            if evaluation is not None:
                evaluation.on_record(kind, record)
            tracking.on_record(kind, record)

        yield Observers(evaluation, on_record)


_WANDB_ID = "wandb_id"


class _Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class Tracking:
    """The ``on_record`` hook of a run with a ``[track]`` table: it sends the run log's numbers to trackers.

    Args:
        table: The ``[track]`` table.
        out: The run's folder.
        config: The resolved config, for trackers that show it.
        resume_step: The step after which a resumed run continues; later values are sent again.
    """

    def __init__(
        self, table: TrackConfig, out: Path, config: Mapping[str, Any], *, resume_step: int | None = None
    ) -> None:
        self._trackers: list[_Tracker] = []
        try:
            if table.tensorboard:
                self._trackers.append(_TensorBoard(out / "tensorboard", config, resume_step))
            if table.wandb_project is not None:
                self._trackers.append(_Wandb(table, out, config))
        except BaseException:
            self.close()
            raise

    def on_record(self, kind: str, record: Mapping[str, Any]) -> None:
        """Send the numbers of a step or an evaluation to the trackers; events have none."""
        if kind == "event" or not self._trackers:
            return
        place = kind if record.get("prefixes", "fixed") == "fixed" else f"{kind}_{record['prefixes']}"
        values = {f"{place}/{name}": value for name, value in select_numbers(record) if name != "step"}
        for tracker in self._trackers:
            tracker.log(values, int(record["step"]))

    def close(self) -> None:
        """Close the trackers, which writes the values that they still hold."""
        for tracker in self._trackers:
            tracker.close()


def select_numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a record by name, and those of a table inside it by ``table/name``; skip lists."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from select_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any], resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "track.tensorboard needs tensorboard", hint="install it with: pip install 'topkd[track]'"
            ) from error
        # From purge_step on, points from before the resume are hidden: the resumed run writes them again.
        self._writer = SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)
        if resume_step is None:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, table: TrackConfig, out: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "track.wandb_project needs wandb", hint="install it with: pip install 'topkd[track]'"
            ) from error
        kept = out / _WANDB_ID
        identity = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
        try:
            self._run = wandb.init(
                project=table.wandb_project,
                entity=table.wandb_entity,
                name=out.name,
                id=identity,
                resume="allow",
                config=dict(config),
                dir=str(out),
            )
        except Exception as error:
            raise ConfigError("wandb cannot be started", got=f"{type(error).__name__}: {error}") from error
        kept.write_text(f"{self._run.id}\n", encoding="utf-8")
        self._run.define_metric("topkd/step")
        self._run.define_metric("*", step_metric="topkd/step")

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "topkd/step": step})

    def close(self) -> None:
        self._run.finish()
