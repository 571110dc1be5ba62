"""Map HTTP statuses other than 200 to error classes, with the server's own message."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from topkd.clients.http.transport import Reply
from topkd.topk.errors import (
    AuthError,
    ContextLimitError,
    KLimitError,
    ModelNotFoundError,
    RequestRefusedError,
    RetryableServerError,
    ServerBusyError,
    ServerError,
    ServerFailedError,
    ServerPausedError,
    ServerTimeoutError,
    UnsupportedError,
)

# "Requested prompt logprobs of 64, which is ...", and the same tail for a list of candidates.
_K_LIMIT = re.compile(r"greater than max allowed: (\d+)", re.IGNORECASE)
# The last one: vLLM clips max_tokens to the room behind the prompt before it checks it, and we never ask for none.
_CONTEXT = re.compile(
    r"maximum context length|maximum model length|max_model_len|context_length_exceeded"
    r"|max_tokens must be at least 1, got 0"
    r"|longer than the model's context length|exceeds the maximum allowed length",  # SGLang's two
    re.IGNORECASE,
)
_NOT_FINITE = "not JSON compliant"
# A model or route without logprobs: reasoning models name a parameter they do not support, others say it in words.
_NO_LOGPROBS = re.compile(
    r"logprobs.{0,40}(not supported|unsupported|not available)|unsupported.{0,40}logprobs", re.IGNORECASE
)
_NO_CANDIDATES = "V2 model runner"
_NO_QUOTA = "insufficient_quota"
_PAUSED = "Generation is paused"  # vLLM 0.33 on, for every request that it does not take until it is resumed
_SHOWN = 400
_Error = TypeVar("_Error", bound=RetryableServerError)


def error_from_reply(reply: Reply, *, where: str, k: int = 0, model: str = "") -> ServerError:
    """Convert a non-200 reply to an error. Pure.

    Args:
        reply: The reply.
        where: Endpoint and model for the message.
        k: The K that was asked for.
        model: The model that was asked for.
    """
    message, code = _read_message(reply)
    status = f"HTTP {reply.status}"
    if reply.status in {401, 403}:
        return AuthError(
            f"the server refuses the API key: {message}", where=where, got=status,
            hint="check api_key, and that one was given (api_key_env, --api-key-env: the variable that holds it)",
        )  # fmt: skip
    limit = _K_LIMIT.search(message)
    if limit:
        error = KLimitError(
            f"K = {k} is above the server's limit",
            where=where,
            got=message,
            expected=f"K <= {limit[1]}",
            hint=f"ask for K <= {limit[1]}, or serve with --max-logprobs {k}",
        )
        error.limit = int(limit[1])
        return error
    if _NOT_FINITE in message:
        failed = ServerFailedError(
            f"the server computed NaN: {message}",
            where=where,
            got=status,
            hint="the model or its cache is broken there",
        )
        return mark_repeating(failed)
    if reply.status == 404:
        return _not_found(message, where=where, model=model)
    if 400 <= reply.status < 500:
        final = _final(message, code, status, where)
        if final is not None:
            return final
    return _retryable(reply, message, status, where) or RequestRefusedError(
        f"the server refuses the request: {message}", where=where, got=status
    )


def _final(message: str, code: str, status: str, where: str) -> ServerError | None:
    """Convert refusals whose meaning is more than their status."""
    if _CONTEXT.search(message) or code == "context_length_exceeded":
        return ContextLimitError(f"too long for the server's context: {message}", where=where, got=status)
    if _NO_CANDIDATES in message:
        hint = "set VLLM_USE_V2_MODEL_RUNNER=1 there"
        return UnsupportedError(f"the server scores no candidates: {message}", where=where, got=status, hint=hint)
    if _NO_LOGPROBS.search(message):
        return UnsupportedError(f"the model serves no logprobs: {message}", where=where, got=status)
    if code == _NO_QUOTA:  # a 429 that no waiting helps
        return RequestRefusedError(f"the account has no quota left: {message}", where=where, got=status)
    return None


def _not_found(message: str, *, where: str, model: str) -> RequestRefusedError:
    if model and "model" in message.lower():
        return ModelNotFoundError(message, where=where, hint="GET /v1/models lists what is served")
    return RequestRefusedError(
        f"the server has no such route: {message}",
        where=where,
        got="HTTP 404",
        hint="is this the base URL of an OpenAI-compatible server, without a path?",
    )


def _retryable(reply: Reply, message: str, status: str, where: str) -> RetryableServerError | None:
    error: RetryableServerError
    if reply.status == 503 and _PAUSED in message:
        error = ServerPausedError(f"the server is paused: {message}", where=where, got=status)
    elif reply.status in {429, 503}:
        error = ServerBusyError(f"the server is busy: {message}", where=where, got=status)
    elif reply.status == 408:
        error = ServerTimeoutError(f"the server gave up waiting: {message}", where=where, got=status)
    elif reply.status == 409 or reply.status >= 500:
        error = ServerFailedError(f"the server failed: {message}", where=where, got=status)
    else:
        return None
    error.retry_after_s = read_retry_after_s(reply.headers)
    if reply.headers.get("x-should-retry", "").lower() == "false":
        mark_repeating(error)
    return error


def mark_repeating(error: _Error) -> _Error:
    """Mark an error that the same request will most likely meet again: one more try is enough to know."""
    error.__dict__["repeats"] = True
    return error


def is_repeating(error: BaseException) -> bool:
    """Check for the mark of ``mark_repeating``."""
    return bool(getattr(error, "__dict__", {}).get("repeats"))


def read_retry_after_s(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Read the pause that the server asks for: ``retry-after-ms``, or ``Retry-After`` as seconds or as a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        if re.fullmatch(r"\d{1,12}(\.\d*)?", text):
            return float(text) * unit
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (TypeError, ValueError):
        return None
    return max(0.0, date.timestamp() - (time.time() if now is None else now))


def _read_message(reply: Reply) -> tuple[str, str]:
    """Read the server's message and, in an OpenAI-style error, its code ("" elsewhere).

    The message is an envelope's, a flat one, a bare string, a detail, or a page's title.
    """
    try:
        body = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _page(reply.body), ""
    if not isinstance(body, dict):
        return _short(str(body)), ""
    error, code = body.get("error"), None
    if isinstance(error, dict):
        code = error.get("code") or error.get("type")
        error = error.get("message")
    message = error or body.get("message") or body.get("detail") or body
    return _short(str(message)), code if isinstance(code, str) else ""


def _page(body: bytes) -> str:
    text = body[:4096].decode("utf-8", "replace")
    title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    if title:
        return f"an HTML page titled {_short(title[1])!r}"
    return _short(text) or "(empty body)"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
