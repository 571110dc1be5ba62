"""``connect``: from a URL to a client that has met its server."""

from __future__ import annotations

from typing import Literal, overload

from pydantic import SecretStr

from topkd.clients.config import ClientConfig
from topkd.clients.dialect import HttpClient
from topkd.clients.fireworks import FireworksEcho
from topkd.clients.probe_dialect import open_client
from topkd.clients.sglang import Sglang
from topkd.clients.vllm import VllmCompletions
from topkd.clients.vllm_generate import VllmGenerate
from topkd.topk.errors import UnsupportedError

# What a fleet of replicas can be made of.
DIALECTS: dict[str, type[VllmCompletions]] = {"vllm": VllmCompletions, "vllm_generate": VllmGenerate}
ScoringClient = VllmCompletions | Sglang | FireworksEcho


@overload
async def connect(
    url: str,
    *,
    dialect: Literal["vllm"] = "vllm",
    model: str | None = None,
    api_key: str | SecretStr | None = None,
    config: ClientConfig | None = None,
) -> VllmCompletions: ...
@overload
async def connect(
    url: str,
    *,
    dialect: str,
    model: str | None = None,
    api_key: str | SecretStr | None = None,
    config: ClientConfig | None = None,
) -> ScoringClient: ...
async def connect(
    url: str,
    *,
    dialect: str = "vllm",
    model: str | None = None,
    api_key: str | SecretStr | None = None,
    config: ClientConfig | None = None,
) -> ScoringClient:
    """A teacher whose server answers and has the model. Close it with ``aclose()``, or use it as a context manager.

    Args:
        url: ``http(s)://host:port``.
        dialect: "vllm", "vllm_generate", "sglang", "fireworks", or "auto" to ask the server which it speaks.
        model: Served name; None takes the only one.
        api_key: ``"env:NAME"``, ``"file:PATH"``, a key, or None.
        config: Time-outs, retries and bounds.

    Raises:
        UnsupportedError: The server speaks a dialect that only samples (OpenAI chat): it cannot teach.
    """
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
