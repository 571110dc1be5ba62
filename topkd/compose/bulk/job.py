"""The loop of ``score`` and ``sample``: it bounds the requests in flight, and counts every row."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from topkd.compose.bulk.config import Cap, JobReport
from topkd.compose.progress import Progress
from topkd.engine.loop.waiting import root_exception
from topkd.engine.models.tokenizer import load_tokenizer
from topkd.offline import ScoreStore
from topkd.offline.store.folder import FORMAT_FILE
from topkd.topk.errors import (
    AuthError,
    KLimitError,
    ModelNotFoundError,
    RequestRefusedError,
    ResponseError,
    RetryableServerError,
    TopkdError,
)

CHUNK = 64  # rows read at a time
_COMMIT_EVERY_S = 1.0
GIVE_UP_AFTER = 32  # consecutive failed rows after which a job ends

# Errors of a single row, and errors that every row would have: those end the job.
ROW_ERRORS = (RequestRefusedError, ResponseError, RetryableServerError)
JOB_ERRORS = (KLimitError, ModelNotFoundError, AuthError)


class Claim(Enum):
    """The decision whether a row may be requested."""

    ASK = "ask"
    ELSEWHERE = "elsewhere"  # another worker requests an equal row
    CAP = "cap"


class SpendingLimit:
    """Remaining budget of a job under all of its caps.

    Tokens are taken before a request is sent. They are not given back if it fails, because it may have been billed.
    """

    def __init__(self, caps: Iterable[Cap]) -> None:
        self._caps = tuple(caps)
        self._prompt_tokens = self._completion_tokens = 0
        self.reached = ""  # name of the cap that refused the last tokens

    def take(self, prompt_tokens: int, completion_tokens: int = 0) -> bool:
        """Take tokens; return False, and take none, if they exceed a cap."""
        prompt, completion = self._prompt_tokens + prompt_tokens, self._completion_tokens + completion_tokens
        for cap in self._caps:
            if prompt * cap.prompt_price + completion * cap.completion_price > cap.amount:
                self.reached = cap.name
                return False
        self._prompt_tokens, self._completion_tokens = prompt, completion
        return True

    def give_back(self, completion_tokens: int) -> None:
        """Give back sampled tokens that were taken and not used."""
        self._completion_tokens -= completion_tokens

    def claim_tokens(self, tokens: int) -> Claim:
        """Take the tokens of a row; after the first row that exceeds a cap, allow no other row."""
        return Claim.ASK if not self.reached and self.take(tokens) else Claim.CAP

    async def claim(self, requests: Sequence[tuple[bytes, int]]) -> list[Claim]:
        """Take the tokens of each request (the ``RequestBudget`` of a job in one process)."""
        return [self.claim_tokens(tokens) for _, tokens in requests]


class FailureTracker:
    """Counts rows that fail, and ends the job after too many consecutive failures.

    Args:
        report: The report that has the counts.
        strict: Whether the first refused row ends the job.
    """

    def __init__(self, report: JobReport, *, strict: bool) -> None:
        self._report, self._strict, self._in_a_row = report, strict, 0

    def refuse(self, number: int, reason: TopkdError) -> None:
        """Count a row that cannot be requested; raise its reason if the job is strict."""
        if self._strict:
            raise reason
        self._report.refused += 1
        self._report.add_failure(number, reason)

    def add(self, number: int, error: TopkdError) -> None:
        """Count a row whose request failed; raise its error after too many consecutive failures."""
        self._in_a_row += 1
        if self._in_a_row >= GIVE_UP_AFTER:
            raise error
        if isinstance(error, RequestRefusedError):
            self.refuse(number, error)
        else:
            self._report.failed += 1
            self._report.add_failure(number, error)

    def reset(self) -> None:
        """Note that the server has answered."""
        self._in_a_row = 0


class NumberedRow(Protocol):
    """A row of the data."""

    @property
    def number(self) -> int:
        """Return its line or row number."""
        ...


Row = TypeVar("Row", bound=NumberedRow)
Read = TypeVar("Read")  # a row, with whether the cache has its result
Reply = TypeVar("Reply")


class BulkJob(ABC, Generic[Read, Row, Reply]):
    """Sends a request for each row of a data file and counts the outcomes.

    Args:
        report: The report to fill in.
        progress: Shows the counts.
        store: A store that is open for appending.
        in_flight: Largest number of requests at once.
        strict: Whether the first refused row ends the job.
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
        """Read the next rows (in a thread) and look them up in the cache; return none at the end of the data."""

    @abstractmethod
    async def start_chunk(self, chunk: Sequence[Read]) -> bool:
        """Start the requests of these rows; return False if a cap ends the job."""

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
        """Request every row, until the data ends or a cap is reached; ``total`` rows are expected (0: not known)."""
        self.total = total
        self.progress.stage(self.stage, total)
        try:
            async with asyncio.TaskGroup() as group:
                committing = group.create_task(_commit_regularly(self.store))  # its failure ends the job
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
        """Start the request of a row, in the slot from ``wait_for_slot``."""
        self.in_flight += 1
        self._requests.create_task(self._process(row))

    def finish(self, row: Row) -> None:
        """Forget a row whose request has succeeded or failed."""

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
        detail = f"{tokens / seconds:.0f} tok/s  {self.in_flight} in flight{self._report.format_failures()}"
        if self.total > done and self.replies:
            detail += f"  ETA {(self.total - done) * seconds / done:.0f} s"
        self.progress.advance(done, detail)


async def _commit_regularly(store: ScoreStore) -> None:
    """Commit replies every second until cancelled, so that a killed job loses only the work of a second."""
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
    """Open a cache for reading; yield None if the folder is not a cache yet."""
    if not (folder / FORMAT_FILE).exists():
        yield None
        return
    with ScoreStore(folder) as store:
        yield store


def load_text_tokenizer(path: str | None) -> Any:
    """Load the tokenizer for rows of text; return None when none is named."""
    return None if path is None else load_tokenizer(path)
