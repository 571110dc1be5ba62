"""``connect``: from a URL, or the URLs of replicas, to a teacher that has met its servers."""

from __future__ import annotations

from typing import Literal, overload

from pydantic import SecretStr

from topkd.clients.config import ClientConfig
from topkd.clients.dialect import HttpClient
from topkd.clients.fleet import Fleet
from topkd.clients.probe_dialect import open_client
from topkd.clients.scorers import DIALECTS, ScoringClient
from topkd.clients.vllm import VllmCompletions
from topkd.topk.errors import UnsupportedError

__all__ = ["DIALECTS", "ScoringClient", "connect"]


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
        if dialect in DIALECTS:
            makes.append(DIALECTS[dialect])
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
