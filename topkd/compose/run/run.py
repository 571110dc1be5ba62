"""One run in a folder: what its commands share, from the lock to the exit stack."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from topkd.compose.progress import Progress
from topkd.compose.run.resume import PreviousRun, enter_run
from topkd.compose.run.signals import StopSignals
from topkd.engine.config.engine_config import EngineConfig

if TYPE_CHECKING:
    from topkd.engine.learner.distributed import Ranks

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where a run lies, and its records.

    Attributes:
        out: Its folder.
        steps: All step records, those before a resume included.
        evals: All evaluations.
        stopped: The signal that ended it early ("" when it ran to its end).
        already: It had been finished before; nothing was done.
    """

    out: Path
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    stopped: str = ""
    already: bool = False


@dataclass(slots=True)
class Run:
    """An open run: its folder is locked, and everything entered here is closed when it ends.

    Attributes:
        out: The run's folder.
        command: Which command can go on with the run.
        progress: Where notes go; silent on every rank but the first.
        previous: What an earlier start has left in the folder.
        ranks: The processes that share the run; None for a single process.
        signals: Signals that end the run in order.
    """

    out: Path
    command: str = "train"
    progress: Progress = field(default_factory=Progress)
    previous: PreviousRun = field(default_factory=PreviousRun)
    ranks: Ranks | None = None
    signals: StopSignals | None = None
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def is_first_rank(self) -> bool:
        """Whether this process writes, measures and asks servers for all of them."""
        return self.ranks is None or self.ranks.main

    @property
    def is_finished(self) -> bool:
        """Whether a resume finds nothing left to do."""
        return self.previous.finished

    def result(self) -> RunResult:
        """Return what an earlier start has finished."""
        return RunResult(self.out, self.previous.steps, self.previous.evals, already=True)

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Enter a context that ends with the run."""
        return self.stack.enter_context(context)

    async def enter_async(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enter an async context that ends with the run."""
        return await self.stack.enter_async_context(context)


@contextlib.asynccontextmanager
async def open_run(
    config: EngineConfig,
    out: str | Path,
    *,
    command: str,
    resume: bool = False,
    progress: Progress | None = None,
    signals: StopSignals | None = None,
) -> AsyncIterator[Run]:
    """Lock a run's folder, read what lies in it, and join the other ranks.

    Args:
        config: Of the run.
        out: Its folder.
        command: Which command can go on with the run.
        resume: Go on with the run that ``out`` holds.
        progress: Where notes and records are shown.
        signals: Signals that end the run in order, to be resumed.
    """
    out, progress = Path(out), progress or Progress()
    async with AsyncExitStack() as stack:
        previous, ranks = stack.enter_context(enter_run(out, config, progress, command=command, resume=resume))
        shown = progress if ranks is None or ranks.main else Progress()
        yield Run(out, command, shown, previous, ranks, signals, stack)
