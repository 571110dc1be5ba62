"""One teacher behind one URL or several, connected and ready to score."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from topkd.clients import ClientConfig, Fleet, VllmInProcess, connect
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import TeacherScorer

IN_PROCESS = "vllm:"  # stands before a folder or a model id, instead of a URL


@dataclass(frozen=True, slots=True)
class OpenTeacher:
    """A teacher that is connected.

    Attributes:
        scorer: One client, or a fleet of replicas.
        name: Name of the model on the server.
        context: Largest number of tokens in a request; None if the server does not return it.
        version: Version of the server; "" if the server does not return it.
        fleet: The same as ``scorer`` if there are replicas, else None.
    """

    scorer: TeacherScorer
    name: str
    context: int | None
    fleet: Fleet | None = None
    version: str = ""

    def fingerprint(self) -> dict[str, str | int | None]:
        """Return the model, server and replicas, for a run's provenance."""
        dialect = type(self.scorer if self.fleet is None else self.fleet.replicas[0].client).__name__
        return {
            "model": self.name, "dialect": dialect, "server_version": self.version, "max_model_len": self.context,
            "replicas": 1 if self.fleet is None else len(self.fleet.replicas),
        }  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """Return the client's counters."""
        found: dict[str, float] = getattr(self.scorer, "metrics", {})
        return dict(found)


@contextlib.asynccontextmanager
async def open_teacher(
    urls: Sequence[str],
    *,
    dialect: str = "vllm",
    model: str | None = None,
    api_key: SecretStr | None = None,
    config: ClientConfig | None = None,
    vocab_size: int | None = None,
    k: int = 20,
    engine: Mapping[str, Any] | None = None,
) -> AsyncIterator[OpenTeacher]:
    """Connect to a teacher, and check that every replica has the same model.

    ``vllm:FOLDER`` instead of a URL loads the model in this process, for top-K lists of at most ``k``; ``engine`` has
    further arguments of ``vllm.LLM``. Ids of ``vocab_size`` or more are refused, in requests and in replies.
    """
    if urls[0].startswith(IN_PROCESS):
        if len(urls) > 1:
            raise ConfigError("vllm:FOLDER cannot be combined with other addresses", got=", ".join(urls),
                              hint="give one vllm:FOLDER, or the URLs of the replicas of one model")  # fmt: skip
        async with await asyncio.to_thread(
            _load_in_process, urls[0].removeprefix(IN_PROCESS), k, vocab_size, engine or {}
        ) as loaded:
            yield OpenTeacher(loaded, model or Path(urls[0].removeprefix(IN_PROCESS)).name, None)
        return
    address = urls[0] if len(urls) == 1 else list(urls)
    async with await connect(
        address, dialect=dialect, model=model, api_key=api_key, config=config, vocab_size=vocab_size
    ) as client:
        info, fleet = await client.server_info(), client if isinstance(client, Fleet) else None
        yield OpenTeacher(client, info.model, info.max_model_len, fleet, info.version)


def _load_in_process(model: str, k: int, vocab_size: int | None, engine: Mapping[str, Any]) -> VllmInProcess:
    if not model:
        raise ConfigError("vllm: needs the folder or id of a model", expected="for example vllm:models/teacher")
    return VllmInProcess(model, vocab_size=vocab_size, **{"max_logprobs": max(k, 1), **engine})
