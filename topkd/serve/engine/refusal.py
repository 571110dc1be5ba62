"""Errors that routes answer with: an HTTP status and a body in vLLM's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import InitErrorDetails

from topkd.serve.engine.jobs import EngineJob


class Refusal(Exception):  # noqa: N818 - not a failure of this program: an answer to the client
    """An error that the route answers the client with.

    Attributes:
        status: HTTP status and ``error.code``.
        kind: ``error.type``.
        param: ``error.param``, the field that is to blame.
    """

    def __init__(self, message: str, *, status: int = 400, kind: str = "BadRequestError", param: str | None = None):
        super().__init__(message)
        self.message, self.status, self.kind, self.param = message, status, kind, param

    def body(self) -> dict[str, Any]:
        """Return vLLM's error body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}


_UNSET = object()


def bad_parameter(message: str, param: str, value: object = _UNSET) -> Refusal:
    """Build a 400 that names the parameter, as vLLM 0.32 does: ``... (parameter=K, value=V)``."""
    shown = f"parameter={param}" if value is _UNSET else f"parameter={param}, value={value}"
    return Refusal(f"{message} ({shown})", param=param)


def unknown_model(name: str, known: list[str]) -> Refusal:
    """Build a 404 that lists the served models."""
    message = f"The model `{name}` does not exist. Valid aliases: {', '.join(known)}."
    return Refusal(message, status=404, kind="NotFoundError", param="model")


def worker_failed(method: str, error: str) -> Refusal:
    """Build a 500 of a control route, in the words vLLM wraps around a worker's exception."""
    message = (
        f"Call to {method} method failed: Worker failed with error '{error}', "
        "please check the stack trace above for the root cause"
    )
    return Refusal(message, status=500, kind="InternalServerError")


def overloaded(waiting: int, limit: int) -> Refusal:
    """Build a 503 for a full queue."""
    message = f"The server is overloaded: {waiting} requests are waiting, at most {limit} may. Please retry later."
    return Refusal(message, status=503, kind="ServiceUnavailableError")


def generation_paused() -> Refusal:
    """Build vLLM 0.33's 503 for a request that comes while the server is paused."""
    return Refusal("Generation is paused. Please retry after it resumes.", status=503, kind="ServiceUnavailableError")


def check_sequences(job: EngineJob, context: int, room: int) -> None:
    """Refuse more completions of one prompt than the cache can hold at once."""
    tokens = min(len(job.ids) + job.sampling.max_tokens, context)
    if job.n > 1 and job.n * tokens > room:
        raise Refusal(
            f"n = {job.n} completions of up to {tokens} tokens need {job.n * tokens} of cache, and there are {room} "
            "(max_kv_tokens): ask for fewer, or for shorter ones"
        )


def not_finite() -> Refusal:
    """Build a 500 for NaN, which JSON cannot carry."""
    return Refusal("Out of range float values are not JSON compliant: nan", status=500, kind="InternalServerError")


def describe_malformed(error: ValidationError) -> Refusal:
    """Build a 400 from pydantic's findings, one per line, as vLLM prints them."""
    findings = error.errors(include_url=False)
    lines = []
    for finding in findings:
        shown: dict[str, Any] = {
            "type": finding["type"],
            "loc": _path(finding["loc"]),
            "msg": finding["msg"],
            "input": _abridge(finding["input"]),
        }
        if ctx := finding.get("ctx"):
            shown["ctx"] = {key: value if isinstance(value, int) else str(value) for key, value in ctx.items()}
        lines.append(f"  {shown}")
    count = len(findings)
    message = f"{count} validation error{'' if count == 1 else 's'}:\n" + "\n".join(lines)
    return Refusal(message, kind="Bad Request", param=_path(findings[0]["loc"]) if findings else None)


def restate_error(error: ValidationError, findings: Sequence[Mapping[str, Any]]) -> ValidationError:
    """Build a ValidationError with ``findings`` in place of those of ``error``, for a validator to raise."""
    lines = [{key: finding[key] for key in ("type", "loc", "input", "ctx") if key in finding} for finding in findings]
    return ValidationError.from_exception_data(error.title, cast("list[InitErrorDetails]", lines))


def describe_malformed_query(param: str, value: str, choices: Sequence[str]) -> Refusal:
    """Build a 400 for a query parameter that is none of ``choices``."""
    *others, last = (repr(choice) for choice in choices)
    expected = f"{', '.join(others)} or {last}"
    finding = {
        "type": "literal_error",
        "loc": f"query.{param}",
        "msg": f"Input should be {expected}",
        "input": value[:200],
        "ctx": {"expected": expected},
    }
    return Refusal(f"1 validation error:\n  {finding}", kind="Bad Request", param=f"query.{param}")


def _path(loc: tuple[int | str, ...]) -> str:
    # Members of a union are named by their type in pydantic's path; vLLM's leaves them out.
    return ".".join(
        ["body", *(str(part) for part in loc if isinstance(part, int) or ("[" not in part and part != "str"))]
    )


def _abridge(value: object) -> str:
    if isinstance(value, dict | list):
        return f"<{type(value).__name__} of {len(value)} items>"
    return str(value)[:200]
