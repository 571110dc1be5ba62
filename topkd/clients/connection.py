"""``connect``: from a URL to a client that has met its server."""

from __future__ import annotations

from pydantic import SecretStr

from topkd.clients.config import ClientConfig
from topkd.clients.vllm import VllmCompletions
from topkd.topk.errors import ConfigError

DIALECTS = {VllmCompletions.dialect: VllmCompletions}


async def connect(
    url: str,
    *,
    dialect: str = "vllm",
    model: str | None = None,
    api_key: str | SecretStr | None = None,
    config: ClientConfig | None = None,
) -> VllmCompletions:
    """A client whose server answers and has the model. Close it with ``aclose()``, or use it as a context manager."""
    if dialect not in DIALECTS:
        raise ConfigError("unknown dialect", got=repr(dialect), expected=" or ".join(sorted(DIALECTS)))
    client = DIALECTS[dialect](url, model=model, api_key=api_key, config=config)
    try:
        await client.server_info()
    except BaseException:
        await client.aclose()
        raise
    return client
