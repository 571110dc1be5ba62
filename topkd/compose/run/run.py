"""One open run in a folder: the parts that train and replay share, from the lock to the exit stack."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from topkd.compose.config.run_config import save_config
from topkd.compose.progress import Progress
from topkd.compose.run.folder import check_free, check_resumable, lock_folder, prepare_folder
from topkd.compose.run.resume import PreviousRun, read_previous_run
from topkd.compose.run.signals import StopSignals
from topkd.engine.config.engine_config import EngineConfig
from topkd.report.load.run_folder import CONFIG
from topkd.topk.errors import TopkdError, TrainingError

if TYPE_CHECKING:
    from topkd.engine.learner.distributed import Ranks

T = TypeVar("T")

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}


@dataclass(frozen=True, slots=True)
class RunResult:
    """The folder and the records of a run.

    Attributes:
        out: Its folder.
        steps: All step records, also those from before a resume.
        evals: All evaluations.
        stopped: Why it ended early, such as a signal's name; "" if it ran to its end.
        already: Whether the run was already finished, so that nothing was done.
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
        command: The command that made the run and can resume it.
        progress: Shows notes; silent on all ranks but the first.
        previous: The run that was already in the folder.
        ranks: The processes that share the run; None for a single process.
        signals: Signals on which the run stops between two steps.
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
        """Whether this process writes, evaluates and checks servers for all ranks."""
        return self.ranks is None or self.ranks.main

    @property
    def is_finished(self) -> bool:
        """Whether the run in the folder is finished, so that a resume has nothing to do."""
        return self.previous.finished

    def result(self) -> RunResult:
        """Return the result of a run that was already finished."""
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
    """Lock a run's folder, read the run in it, and join the other ranks; see ``Run`` for the arguments."""
    out, progress = Path(out), progress or Progress()
    (check_resumable if resume else check_free)(out)  # before the lock file is made
    with _convert_write_errors(out), _join_ranks() as ranks, contextlib.ExitStack() as locks:
        previous = PreviousRun()
        if ranks is None or ranks.main:
            locks.enter_context(lock_folder(out))
            previous = _read_or_prepare(out, config, progress, command=command, resume=resume)
        if ranks is not None:
            previous, progress = ranks.first(previous), progress if ranks.main else Progress()
        async with AsyncExitStack() as stack:
            yield Run(out, command, progress, previous, ranks, signals, stack)


@contextlib.contextmanager
def open_claimed_run(
    config: EngineConfig, out: Path, progress: Progress | None = None, signals: StopSignals | None = None
) -> Iterator[Run]:
    """Lock a folder that was made for this run (of a demo, or of a cell), and save the config there."""
    with _convert_write_errors(out), lock_folder(out):
        save_config(config, out / CONFIG)
        yield Run(out, progress=progress or Progress(), signals=signals)


def _read_or_prepare(out: Path, config: EngineConfig, progress: Progress, *, command: str, resume: bool) -> PreviousRun:
    if not resume:
        prepare_folder(out)
        save_config(config, out / CONFIG)
        return PreviousRun()
    previous = read_previous_run(out, config, command=command, note=progress.note)
    if not previous.finished:
        step = previous.step
        progress.note(f"resuming after step {step}" if step else "no checkpoint yet: starting from the beginning")
    return previous


@contextlib.contextmanager
def _join_ranks() -> Iterator[Ranks | None]:
    """Join torchrun's process group; None for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    from topkd.engine.learner.distributed import Ranks, is_rank_lost

    ranks = Ranks.from_environment()
    try:
        yield ranks
    except RuntimeError as error:
        if not is_rank_lost(error):
            raise
        raise TrainingError(
            "another process of this run is gone, or does not answer", where=f"process {ranks.rank} of {ranks.size}",
            got=str(error).partition("\n")[0][:200], hint="see its last message; then resume with --resume",
        ) from error  # fmt: skip
    finally:
        ranks.close()


@contextlib.contextmanager
def _convert_write_errors(out: Path) -> Iterator[None]:
    """Convert the error about a file that cannot be written into a TrainingError of one line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, TopkdError) or error.errno not in _UNWRITABLE:
            raise
        raise TrainingError(
            "cannot write the run's files", where=str(error.filename or out), got=error.strerror,
            hint="free some space or repair the folder; then resume with --resume",
        ) from error  # fmt: skip
