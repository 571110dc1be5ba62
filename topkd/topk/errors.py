"""Every error topkd raises on purpose, in one tree.

::

    TopkdError
        ConfigError (ValueError)              a config, flag or argument that cannot be right
        DataError (ValueError)                a data row or sample file that cannot be read
        ServerError
            RetryableServerError              trying again may help; only clients.http.retry acts on it
                ServerUnreachableError (ConnectionError)
                ServerTimeoutError (TimeoutError)
                ServerBusyError               429, 503: carries retry_after_s
                ServerFailedError             other 5xx
            FinalServerError                  trying again cannot help
                RequestRefusedError (ValueError)      4xx with the server's own message
                    KLimitError               K above the server's limit: carries limit
                    ContextLimitError         the prompt does not fit the context
                    ModelNotFoundError (LookupError)
                AuthError (PermissionError)
                UnsupportedError              the endpoint lacks the capability that was asked for
        ResponseError (ValueError)            a reply that cannot be trusted: shape, mass, NaN, nulls
            AlignmentError                    rows or token identities do not match the request
        CacheError
            CacheMissError (LookupError)      replay found no record
            CacheCorruptError (ValueError)    a checksum or a header does not hold
        SyncError (RuntimeError)              weights could not be brought to a server
        TrainingError (RuntimeError)          a run cannot go on (non-finite loss, no valid token, ...)

``ServerTimeoutError``, ``CacheError`` and ``ServerError`` also are what Python itself would have raised (TimeoutError,
OSError), so a caller may catch either. All of them survive pickling: keyword fields travel in ``__dict__``.
"""

from __future__ import annotations


class TopkdError(Exception):
    """Base of the tree. ``str(error)`` is one line: what (where): got, expected; what to do.

    Attributes:
        where: Endpoint, model, request, file or position the error is about ("" when the message already says).
        hint: What the reader can do about it ("" when nothing is known).
        exit_code: What a command that fails with it returns: 2 for the user's mistake, 1 for a failed run.
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
    """A config, flag or argument that cannot be right."""

    exit_code = 2


class DataError(TopkdError, ValueError):
    """A data row or sample file that cannot be read; ``where`` names file and line."""

    exit_code = 2


class ServerError(TopkdError, OSError):
    """A server did not answer as asked."""

    __str__ = Exception.__str__


class RetryableServerError(ServerError):
    """Trying again may help. ``retry_after_s`` is the server's own wish, when it stated one."""

    retry_after_s: float | None = None


class ServerUnreachableError(RetryableServerError, ConnectionError):
    """No connection, or one that broke before the reply was whole."""


class ServerTimeoutError(RetryableServerError, TimeoutError):
    """No reply within the time allowed."""


class ServerBusyError(RetryableServerError):
    """429 or 503: the server asks for fewer requests."""


class ServerFailedError(RetryableServerError):
    """Any other 5xx."""


class FinalServerError(ServerError):
    """Trying again cannot help."""


class RequestRefusedError(FinalServerError, ValueError):
    """A 4xx; the message holds the server's own words."""

    exit_code = 2


class KLimitError(RequestRefusedError):
    """K is above what the server serves. ``limit`` is the server's own, when it said so."""

    limit: int | None = None


class ContextLimitError(RequestRefusedError):
    """The prompt (plus what must be generated) does not fit the server's context."""


class ModelNotFoundError(RequestRefusedError, LookupError):
    """The server has no model of that name."""


class AuthError(FinalServerError, PermissionError):
    """401 or 403."""

    exit_code = 2


class UnsupportedError(FinalServerError):
    """The endpoint lacks a capability that was asked for."""

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
    """A checksum or a header of the cache does not hold."""


class SyncError(TopkdError, RuntimeError):
    """Weights could not be brought to a server, or the server does not confirm them."""


class TrainingError(TopkdError, RuntimeError):
    """A run cannot go on."""
