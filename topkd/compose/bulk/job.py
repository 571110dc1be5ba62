"""The pump of ``score`` and ``sample``: a bounded number of requests in flight, and a count of every row."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from topkd.compose.bulk.report import JOB_ERRORS, ROW_ERRORS, FailureTracker, JobReport
from topkd.compose.progress import Progress
from topkd.engine.loop.waiting import root_exception
from topkd.engine.models.tokenizer import load_tokenizer
from topkd.offline import ScoreStore
from topkd.offline.store.folder import FORMAT_FILE

CHUNK = 64  # rows read at a time
_COMMIT_EVERY_S = 1.0


class NumberedRow(Protocol):
    """A row of the data."""

    @property
    def number(self) -> int:
        """Its line or row number."""
        ...


Row = TypeVar("Row", bound=NumberedRow)
Read = TypeVar("Read")  # a row as it was read, with what the cache says of it
Reply = TypeVar("Reply")


class BulkJob(ABC, Generic[Read, Row, Reply]):
    """Asks for the rows of a data file and counts the outcome of each.

    Args:
        report: Filled in.
        progress: Shows the counts.
        store: Open for appending.
        in_flight: Requests at once.
        strict: The first refused row ends the job.
    """

    stage: str

    def __init__(
        self, report: JobReport, progress: Progress, store: ScoreStore, *, in_flight: int, strict: bool
    ) -> None:
        self.progress, self.store = progress, store
        self.failures = FailureTracker(report, strict=strict)
        self.in_flight = self.replies = self.total = 0
        self.slot_freed = asyncio.Event()
        self._slots = asyncio.Semaphore(in_flight)
        self._requests = asyncio.TaskGroup()
        self._report, self._start_time = report, time.monotonic()

    @abstractmethod
    def read_chunk(self) -> Sequence[Read]:
        """Read the next rows in a thread, with what the cache has of them; none at the end of the data."""

    @abstractmethod
    async def start_chunk(self, chunk: Sequence[Read]) -> bool:
        """Start the requests of these rows; return False when a cap ends the job."""

    @abstractmethod
    async def ask(self, row: Row) -> Reply:
        """Send the request of a row."""

    @abstractmethod
    async def record(self, row: Row, reply: Reply) -> None:
        """Count a reply, and store it."""

    @abstractmethod
    def count_progress(self) -> tuple[int, int]:
        """Return how many rows are done, and how many tokens were paid for."""

    async def run(self, total: int) -> None:
        """Ask for every row, up to the end of the data or to a cap; ``total`` rows are expected (0: not known)."""
        self.total = total
        self.progress.stage(self.stage, total)
        try:
            async with asyncio.TaskGroup() as group:
                committing = group.create_task(_commit_regularly(self.store))  # one that fails ends the job
                async with self._requests:
                    while chunk := await asyncio.to_thread(self.read_chunk):
                        if not await self.start_chunk(chunk):
                            break
                        self.show()
                committing.cancel()
        except BaseExceptionGroup as errors:
            raise root_exception(errors) from errors

    async def wait_for_slot(self) -> None:
        """Wait until another request may be started."""
        await self._slots.acquire()

    def start(self, row: Row) -> None:
        """Start the request of a row, in the slot that was waited for."""
        self.in_flight += 1
        self._requests.create_task(self._process(row))

    def finish(self, row: Row) -> None:
        """Forget a row whose request has ended, whatever came of it."""

    async def _process(self, row: Row) -> None:
        try:
            reply = await self.ask(row)
        except JOB_ERRORS:
            raise
        except ROW_ERRORS as error:
            self.failures.add(row.number, error)
        else:
            self.failures.reset()
            await self.record(row, reply)
            self.replies += 1
        finally:
            self.in_flight -= 1
            self.finish(row)
            self._slots.release()
            self.slot_freed.set()
        self.show()

    def show(self) -> None:
        """Show the counts, the rate and the time that is left."""
        done, tokens = self.count_progress()
        seconds = max(time.monotonic() - self._start_time, 1e-9)
        detail = f"{tokens / seconds:.0f} tok/s  {self.in_flight} in flight{self._report.failure_counts()}"
        if self.total > done and self.replies:
            detail += f"  ETA {(self.total - done) * seconds / done:.0f} s"
        self.progress.advance(done, detail)


async def _commit_regularly(store: ScoreStore) -> None:
    """Make replies durable until cancelled, so that a killed job loses the work of one second."""
    while True:
        await asyncio.sleep(_COMMIT_EVERY_S)
        await asyncio.to_thread(store.commit)


def sum_counters(counters: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add up the counters of several clients."""
    total: dict[str, float] = {}
    for client_counters in counters:
        for name, number in client_counters.items():
            total[name] = total.get(name, 0.0) + number
    return total


@contextlib.contextmanager
def open_existing_store(folder: Path) -> Iterator[ScoreStore | None]:
    """Open the cache of an estimate for reading; None where there is no cache yet."""
    if not (folder / FORMAT_FILE).exists():
        yield None
        return
    with ScoreStore(folder) as store:
        yield store


def load_text_tokenizer(path: str | None) -> Any:
    """Load the tokenizer for rows of text; return None when none is named."""
    return None if path is None else load_tokenizer(path)
