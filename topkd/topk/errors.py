"""Every error that topkd raises on purpose, in one tree.

::

    TopkdError
        ConfigError (ValueError)              an invalid config, flag or argument
        DataError (ValueError)                a data row or sample file that cannot be read
        ServerError
            RetryableServerError              a retry may help; only clients.http.retry retries
                ServerUnreachableError (ConnectionError)
                ServerTimeoutError (TimeoutError)
                ServerBusyError               429, 503: has retry_after_s
                    ServerPausedError         takes no request until it is resumed
                ServerFailedError             other 5xx
            FinalServerError                  a retry cannot help
                RequestRefusedError (ValueError)      4xx with the server's own message
                    KLimitError               K above the server's limit: has limit
                    ContextLimitError         the prompt does not fit the context
                    ModelNotFoundError (LookupError)
                AuthError (PermissionError)
                UnsupportedError              the endpoint lacks a capability that is needed
        ResponseError (ValueError)            a reply that cannot be trusted: shape, mass, NaN, nulls
            AlignmentError                    rows or token identities do not match the request
        CacheError
            CacheMissError (LookupError)      replay found no record
            CacheCorruptError (ValueError)    a checksum or a header is wrong
        SyncError (RuntimeError)              weights could not be sent to a server
        TrainingError (RuntimeError)          a run cannot continue (non-finite loss, no valid token, ...)

``ServerTimeoutError``, ``CacheError`` and ``ServerError`` are also subclasses of what Python itself would raise
(TimeoutError, OSError), so a caller may catch either. All of them can be pickled: keyword fields are kept in
``__dict__``.
"""

from __future__ import annotations


class TopkdError(Exception):
    """Base of the tree. ``str(error)`` is one line: what (where): got, expected; what to do.

    Attributes:
        where: Endpoint, model, request, file or position of the error ("" when the message has it already).
        hint: What the user can do about it ("" when nothing is known).
        exit_code: Exit code of a command that fails with it: 2 for a user's mistake, 1 for a failed run.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        got: object = None,
        expected: object = None,
        hint: str = "",
    ) -> None:
        self.what, self.where, self.got, self.expected, self.hint = what, where, got, expected, hint
        text = what
        if where:
            text += f" ({where})"
        facts = [f"{name} {value}" for name, value in (("got", got), ("expected", expected)) if value is not None]
        if facts:
            text += ": " + ", ".join(facts)
        if hint:
            text += f"; {hint}"
        super().__init__(" ".join(text.split()))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[TopkdError], args: tuple[object, ...], state: dict[str, object]) -> TopkdError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(TopkdError, ValueError):
    """An invalid config, flag or argument."""

    exit_code = 2


class DataError(TopkdError, ValueError):
    """A data row or sample file that cannot be read; ``where`` names file and line."""

    exit_code = 2


class ServerError(TopkdError, OSError):
    """A server did not answer the request properly."""

    __str__ = Exception.__str__


class RetryableServerError(ServerError):
    """A retry may help. ``retry_after_s`` is the delay that the server asked for, or None."""

    retry_after_s: float | None = None


class ServerUnreachableError(RetryableServerError, ConnectionError):
    """No connection, or one that broke before the reply was complete."""


class ServerTimeoutError(RetryableServerError, TimeoutError):
    """No reply within the time allowed."""


class ServerBusyError(RetryableServerError):
    """Status 429 or 503: the server asks for fewer requests."""


class ServerPausedError(ServerBusyError):
    """The server is paused (for new weights): what was sent was not run, or was aborted; it is sent again."""


class ServerFailedError(RetryableServerError):
    """Another 5xx status."""


class FinalServerError(ServerError):
    """A retry cannot help."""


class RequestRefusedError(FinalServerError, ValueError):
    """Another 4xx status; the message has the server's own text."""

    exit_code = 2


class KLimitError(RequestRefusedError):
    """K is above the server's limit. ``limit`` is that limit, or None if the server did not state it."""

    limit: int | None = None


class ContextLimitError(RequestRefusedError):
    """The prompt (plus what must be generated) does not fit the server's context."""


class ModelNotFoundError(RequestRefusedError, LookupError):
    """The server has no model of that name."""


class AuthError(FinalServerError, PermissionError):
    """Status 401 or 403: the server does not accept the API key."""

    exit_code = 2


class UnsupportedError(FinalServerError):
    """The endpoint lacks a capability that is needed."""

    exit_code = 2


class ResponseError(TopkdError, ValueError):
    """A reply that cannot be trusted: wrong shape, mass above one, NaN, nulls, unreadable JSON."""


class AlignmentError(ResponseError):
    """Rows or token identities of a reply do not match the request."""


class CacheError(TopkdError, OSError):
    """The score cache cannot be used."""

    __str__ = Exception.__str__


class CacheMissError(CacheError, LookupError):
    """Replay found no record for a key."""


class CacheCorruptError(CacheError, ValueError):
    """A checksum or a header of the cache is wrong."""


class SyncError(TopkdError, RuntimeError):
    """Weights could not be sent to a server, or the server does not confirm them."""


class TrainingError(TopkdError, RuntimeError):
    """A run cannot continue."""
