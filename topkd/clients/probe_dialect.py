"""Which dialect a server speaks, and a client that speaks it: what ``dialect="auto"`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from topkd.clients.config import ClientConfig
from topkd.clients.dialect import HttpClient
from topkd.clients.openai import OpenAIChat
from topkd.clients.probe_wire import Wire
from topkd.clients.scorers import DIALECTS as SCORING
from topkd.clients.vllm_generate import ROUTE
from topkd.topk.errors import ConfigError

DIALECTS: dict[str, Callable[..., HttpClient]] = {**SCORING, "openai": OpenAIChat}


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
            if not _hosted(url):
                await asking.server_info()
            dialect = await detect(asking)
    client = DIALECTS[dialect](url, model=model, api_key=api_key, config=config, **options)
    try:
        if not _hosted(url):
            await client.server_info()
    except BaseException:
        await client.aclose()
        raise
    return client


def _hosted(url: str) -> bool:
    """Whether listing models would list a catalogue."""
    host = urlsplit(url).hostname or ""
    return host.endswith(".fireworks.ai") or host in {"fireworks.ai", "api.openai.com"}
