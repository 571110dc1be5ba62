"""``connect``: from a URL, or the URLs of replicas, to a teacher whose server answers."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, Unpack, cast, overload
from urllib.parse import urlsplit

from topkd.clients.dialects.base import ConnectOptions, HttpClient, ScoringClient, ServerFacts
from topkd.clients.dialects.records import AUTO, DIALECTS, find_dialect, list_dialects
from topkd.clients.dialects.vllm import VllmCompletions
from topkd.clients.fleet.fleet import Fleet
from topkd.topk.errors import ModelNotFoundError, UnsupportedError

__all__ = ["ScoringClient", "connect", "open_client"]


@overload
async def connect(
    url: str, *, dialect: Literal["vllm"] = "vllm", **options: Unpack[ConnectOptions]
) -> VllmCompletions: ...
@overload
async def connect(url: str, *, dialect: str, **options: Unpack[ConnectOptions]) -> ScoringClient: ...
@overload
async def connect(
    url: list[str] | tuple[str, ...], *, dialect: str = "vllm", **options: Unpack[ConnectOptions]
) -> Fleet: ...
async def connect(
    url: str | list[str] | tuple[str, ...], *, dialect: str = "vllm", **options: Unpack[ConnectOptions]
) -> ScoringClient | Fleet:
    """Connect to a teacher and check that its server answers and has the model.

    Close it with ``aclose()``, or use it as a context manager. Several URLs are replicas of one teacher: a ``Fleet`` of
    them, once they are seen to score alike.

    Args:
        url: ``http(s)://host:port``, or several.
        dialect: A dialect that scores (``list_dialects(scores=True)``), or "auto" to ask each server which it speaks.
        **options: ``model``, ``api_key``, ``config`` and ``vocab_size``; see ``ConnectOptions``.

    Raises:
        UnsupportedError: The server speaks a dialect that only samples (OpenAI chat): it cannot teach.
        ResponseError: Replicas disagree about the same tokens.
    """
    if isinstance(url, str):
        return await _open_scoring_client(url, dialect, options)
    makes: list[type[ScoringClient]] = []
    for each in url:
        if dialect != AUTO and find_dialect(dialect).scores:
            makes.append(cast("type[ScoringClient]", find_dialect(dialect).load_client()))
            continue
        async with await _open_scoring_client(each, dialect, options) as client:
            makes.append(type(client))
    fleet = Fleet(url, make=makes, **options)
    try:
        await fleet.check_replicas()
    except BaseException:
        await fleet.aclose()
        raise
    return fleet


async def _open_scoring_client(url: str, dialect: str, options: ConnectOptions) -> ScoringClient:
    client = await open_client(url, dialect=dialect, **options)
    if not isinstance(client, ScoringClient):
        await client.aclose()
        raise UnsupportedError(
            "this server only samples: it cannot score a given completion, so it cannot teach",
            where=client.where(),
            got=f"dialect {client.dialect}",
            expected="one of " + ", ".join(list_dialects(scores=True)[1:]),
            hint=f"`topkd probe {client.endpoint.url}` shows what it can do",
        )
    return client


async def detect_dialect(client: HttpClient) -> str:
    """Find the dialect of a server by which routes answer: a few GETs, no tokens.

    Whether it does what its routes promise is for the probe, and for the checks of each reply.
    """
    server = ServerFacts(client)
    for name, dialect in DIALECTS.items():
        if await dialect.load_client().matches(server):
            return name
    raise UnsupportedError("unknown server: none of the dialects matches it", where=client.where())


async def open_client(url: str, *, dialect: str = AUTO, **options: Any) -> HttpClient:
    """Open a client that speaks the server's dialect, once its server has answered.

    Args:
        url: ``http(s)://host:port``.
        dialect: A name of ``DIALECTS``, or "auto".
        options: Those of ``HttpClient``, and further ones of the dialect's client.
    """
    if dialect == AUTO:
        names = {*ConnectOptions.__annotations__, "transport"}
        shared = {name: value for name, value in options.items() if name in names}
        async with HttpClient(url, **shared) as asking:
            if not _is_hosted(url):
                with contextlib.suppress(ModelNotFoundError):  # the dialect's own client knows what its server renames
                    await asking.server_info()
            dialect = await detect_dialect(asking)
    client = find_dialect(dialect).load_client()(url, **options)
    try:
        if not _is_hosted(url):
            await client.server_info()
    except BaseException:
        await client.aclose()
        raise
    return client


def _is_hosted(url: str) -> bool:
    """Check for a hosted service, where listing models would list a catalogue."""
    host = urlsplit(url).hostname or ""
    return host.endswith(".fireworks.ai") or host in {"fireworks.ai", "api.openai.com"}
