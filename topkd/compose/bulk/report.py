"""The report that ``score`` and ``sample`` share, and how they treat rows that fail."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, TypeAlias

from pydantic import Field

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

# Errors of a single row; an error that every row would meet ends the job.
ROW_ERRORS = (RequestRefusedError, ResponseError, RetryableServerError)
JOB_ERRORS = (KLimitError, ModelNotFoundError, AuthError)


@dataclass(slots=True)
class JobReport:
    """The outcome of a job's rows; ``refusals`` holds the first 1,000."""

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

    def add_failure(self, number: int, error: TopkdError) -> None:
        """Record why a row is not in the cache."""
        self.reasons[error.what] += 1
        if len(self.refusals) < KEPT_REFUSALS:
            self.refusals.append({"row": number, "reason": str(error)})

    def failure_counts(self) -> str:
        """Format the counts that a progress line shows where they are not zero."""
        counts = ((self.cached, "cached"), (self.refused, "refused"), (self.failed, "failed"))
        return "".join(f"  {count} {name}" for count, name in counts if count)

    @property
    def complete(self) -> bool:
        """Whether every valid row was asked for and answered."""
        return not self.failed and not self.stopped

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return {**asdict(self), "reasons": dict(self.reasons), "complete": self.complete}


class FailureTracker:
    """Counts rows that fail, and ends the job when the server does not answer any more.

    Args:
        report: Where they are counted.
        strict: The first row that is refused ends the job.
    """

    def __init__(self, report: JobReport, *, strict: bool) -> None:
        self._report, self._strict, self._in_a_row = report, strict, 0

    def refuse(self, number: int, reason: TopkdError) -> None:
        """Count a row that cannot be asked for."""
        if self._strict:
            raise reason
        self._report.refused += 1
        self._report.add_failure(number, reason)

    def add(self, number: int, error: TopkdError) -> None:
        """Count a row whose request failed; the last of too many in a row is raised."""
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
