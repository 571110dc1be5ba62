"""``connect``: from a URL, or the URLs of replicas, to a teacher that has met its servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload
from urllib.parse import urlsplit

from pydantic import SecretStr

from topkd.clients.config import ClientConfig
from topkd.clients.dialects.base import HttpClient
from topkd.clients.dialects.openai import OpenAIChat
from topkd.clients.dialects.raw_requests import Wire
from topkd.clients.dialects.scoring import DIALECTS as SCORING
from topkd.clients.dialects.scoring import ScoringClient
from topkd.clients.dialects.vllm import VllmCompletions
from topkd.clients.dialects.vllm_generate import ROUTE
from topkd.clients.fleet.fleet import Fleet
from topkd.topk.errors import ConfigError, UnsupportedError

__all__ = ["DIALECTS", "ScoringClient", "connect"]

DIALECTS: dict[str, Callable[..., HttpClient]] = {**SCORING, "openai": OpenAIChat}


@overload
async def connect(
    url: str,
    *,
    dialect: Literal["vllm"] = "vllm",
    model: str | None = None,
    api_key: str | SecretStr | None = None,
    config: ClientConfig | None = None,
    vocab_size: int | None = None,
) -> VllmCompletions: ...
@overload
async def connect(
    url: str,
    *,
    dialect: str,
    model: str | None = None,
    api_key: str | SecretStr | None = None,
    config: ClientConfig | None = None,
    vocab_size: int | None = None,
) -> ScoringClient: ...
@overload
async def connect(
    url: list[str] | tuple[str, ...],
    *,
    dialect: str = "vllm",
    model: str | None = None,
    api_key: str | SecretStr | None = None,
    config: ClientConfig | None = None,
    vocab_size: int | None = None,
) -> Fleet: ...
async def connect(
    url: str | list[str] | tuple[str, ...],
    *,
    dialect: str = "vllm",
    model: str | None = None,
    api_key: str | SecretStr | None = None,
    config: ClientConfig | None = None,
    vocab_size: int | None = None,
) -> ScoringClient | Fleet:
    """A teacher whose server answers and has the model. Close it with ``aclose()``, or use it as a context manager.

    Several URLs are replicas of one teacher: a ``Fleet`` of them, after they were seen to score alike.

    Args:
        url: ``http(s)://host:port``, or several.
        dialect: "vllm", "vllm_generate", "sglang", "fireworks", or "auto" to ask each server which it speaks.
        model: Served name; None takes the only one.
        api_key: ``"env:NAME"``, ``"file:PATH"``, a key, or None.
        config: Time-outs, retries and bounds.
        vocab_size: Ids at or past it are refused, in requests and replies; None takes them (no server states its own).

    Raises:
        UnsupportedError: The server speaks a dialect that only samples (OpenAI chat): it cannot teach.
        ResponseError: Replicas disagree about the same tokens.
    """
    if isinstance(url, str):
        client = await _client(url, dialect, model, api_key, config)
        client.vocab_size = vocab_size
        return client
    makes: list[type[ScoringClient]] = []
    for each in url:
        if dialect in SCORING:
            makes.append(SCORING[dialect])
            continue
        async with await _client(each, dialect, model, api_key, config) as client:
            makes.append(type(client))
    fleet = Fleet(url, make=makes, model=model, api_key=api_key, config=config, vocab_size=vocab_size)
    try:
        await fleet.meet()
    except BaseException:
        await fleet.aclose()
        raise
    return fleet


async def _client(
    url: str, dialect: str, model: str | None, api_key: str | SecretStr | None, config: ClientConfig | None
) -> ScoringClient:
    client: HttpClient = await open_client(url, dialect=dialect, model=model, api_key=api_key, config=config)
    if not isinstance(client, ScoringClient):
        await client.aclose()
        raise UnsupportedError(
            "this server only samples: it cannot score a given completion, so it cannot teach",
            where=client.where(),
            got=f"dialect {client.dialect}",
            expected="vLLM, SGLang or Fireworks",
            hint=f"`topkd probe {client.endpoint.url}` shows what it can do",
        )
    return client


async def detect(client: HttpClient) -> str:
    """The dialect of the server behind a client, by which routes answer: a few GETs, no tokens.

    A vLLM has ``/version``, and scores cheaper where ``/inference/v1/generate`` is mounted; an SGLang says its own
    version in ``/server_info``; anything else with ``/v1/models`` is an OpenAI-compatible server, which only samples
    as far as one can know. Whether it does what its routes promise is for the probe, and for the checks of each reply.
    """
    host = urlsplit(client.endpoint.url).hostname or ""
    if host == "fireworks.ai" or host.endswith(".fireworks.ai"):
        return "fireworks"
    wire = Wire(client)
    if await client.server_version():
        return "vllm_generate" if await wire.mounted(ROUTE) else "vllm"
    for route in ("/server_info", "/get_server_info"):
        info = await wire.get(route)
        if info is not None and ("sglang" in str(info.get("version", "")) or "tokenizer_path" in info):
            return "sglang"
    if await wire.mounted("/generate") and await wire.get("/model_info"):
        return "sglang"
    return "openai"


async def open_client(
    url: str,
    *,
    dialect: str = "auto",
    model: str | None = None,
    api_key: str | SecretStr | None = None,
    config: ClientConfig | None = None,
    **options: Any,
) -> HttpClient:
    """A client that speaks the server's dialect, after its server has answered.

    Args:
        url: ``http(s)://host:port``.
        dialect: A name of ``DIALECTS``, or "auto".
        model: Served name; None takes the only one.
        api_key: As for ``HttpClient``.
        config: As for ``HttpClient``.
        options: Further arguments of the dialect's client.
    """
    if dialect != "auto" and dialect not in DIALECTS:
        raise ConfigError("unknown dialect", got=repr(dialect), expected="auto, " + ", ".join(sorted(DIALECTS)))
    if dialect == "auto":
        async with HttpClient(url, model=model, api_key=api_key, config=config) as asking:
            if not _is_hosted(url):
                await asking.server_info()
            dialect = await detect(asking)
    client = DIALECTS[dialect](url, model=model, api_key=api_key, config=config, **options)
    try:
        if not _is_hosted(url):
            await client.server_info()
    except BaseException:
        await client.aclose()
        raise
    return client


def _is_hosted(url: str) -> bool:
    """Whether listing models would list a catalogue."""
    host = urlsplit(url).hostname or ""
    return host.endswith(".fireworks.ai") or host in {"fireworks.ai", "api.openai.com"}
