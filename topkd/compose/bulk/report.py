"""What ``score`` and ``sample`` share: what they count of their rows, and what they do about one that fails."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from topkd.offline import ScoreStore
from topkd.topk.errors import (
    AuthError,
    KLimitError,
    ModelNotFoundError,
    RequestRefusedError,
    ResponseError,
    RetryableServerError,
    TopkdError,
)

Price: TypeAlias = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Cost: TypeAlias = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Rows: TypeAlias = Annotated[int, Field(gt=0, le=sys.maxsize)]
InFlight: TypeAlias = Annotated[int, Field(gt=0, le=10_000)]  # each is a task and, while it waits, a connection

KEPT_REFUSALS = 1000  # of a report; all are counted
GIVE_UP_AFTER = 32  # rows in a row that the server does not answer
_COMMIT_EVERY_S = 1.0

# Trouble with this very row; trouble that every row would have ends the job.
ROW_TROUBLE = (RequestRefusedError, ResponseError, RetryableServerError)
JOB_TROUBLE = (KLimitError, ModelNotFoundError, AuthError)


@dataclass(slots=True)
class JobReport:
    """What became of the rows of a job; ``refusals`` holds the first 1,000."""

    out: str
    teacher: str = ""
    k: int = 0
    rows: int = 0
    cached: int = 0
    refused: int = 0
    failed: int = 0
    cost: float | None = None
    estimate: bool = False
    stopped: str = ""
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    client: dict[str, float] = field(default_factory=dict)

    def blame(self, number: int, error: TopkdError) -> None:
        """Remember why a row is not in the cache."""
        self.reasons[error.what] += 1
        if len(self.refusals) < KEPT_REFUSALS:
            self.refusals.append({"row": number, "reason": str(error)})

    def setbacks(self) -> str:
        """The counts that a progress line shows once there is something to count."""
        counts = ((self.cached, "cached"), (self.refused, "refused"), (self.failed, "failed"))
        return "".join(f"  {count} {name}" for count, name in counts if count)

    @property
    def complete(self) -> bool:
        """Everything that could be asked was; refused rows are what the data lacks, not the job."""
        return not self.failed and not self.stopped

    def as_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {**asdict(self), "reasons": dict(self.reasons), "complete": self.complete}


class Troubles:
    """Writes down rows that fail, and ends the job when the server answers for none any more.

    Args:
        report: Where they are counted.
        strict: The first row that is refused ends the job.
    """

    def __init__(self, report: JobReport, *, strict: bool) -> None:
        self._report, self._strict, self._in_a_row = report, strict, 0

    def refuse(self, number: int, reason: TopkdError) -> None:
        """A row that cannot be asked."""
        if self._strict:
            raise reason
        self._report.refused += 1
        self._report.blame(number, reason)

    def failed(self, number: int, error: TopkdError) -> None:
        """A row that was asked without success; the last of too many in a row is raised."""
        self._in_a_row += 1
        if self._in_a_row >= GIVE_UP_AFTER:
            raise error
        if isinstance(error, RequestRefusedError):
            self.refuse(number, error)
        else:
            self._report.failed += 1
            self._report.blame(number, error)

    def answered(self) -> None:
        """The server is there."""
        self._in_a_row = 0


async def committing(store: ScoreStore) -> None:
    """Until it is cancelled: makes answers durable, so that kill -9 loses a second's work and not a group's."""
    while True:
        await asyncio.sleep(_COMMIT_EVERY_S)
        await asyncio.to_thread(store.commit)
