"""One teacher behind one URL or several, met and ready to score."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from pydantic import SecretStr

from topkd.clients import ClientConfig, Fleet, connect
from topkd.clients.connection import DIALECTS
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import Ids, TeacherScorer


@dataclass(frozen=True, slots=True)
class OpenTeacher:
    """A teacher that has answered.

    Attributes:
        scorer: One client, or a fleet of replicas.
        name: The served model name.
        context: Tokens that a request may have, None when the server does not say.
        fleet: The same as ``scorer`` where there are replicas.
    """

    scorer: TeacherScorer
    name: str
    context: int | None
    fleet: Fleet | None = None

    @property
    def first_cost(self) -> int:
        """How often the first row is sent: replicas are compared on it before anything else."""
        return 1 if self.fleet is None else 1 + len(self.fleet.replicas)

    async def agree(self, ids: Ids, start: int, k: int) -> None:
        """Raises ResponseError when replicas do not serve the same weights."""
        if self.fleet is not None:
            await self.fleet.agreement(ids, start, k)

    def metrics(self) -> dict[str, float]:
        """The client's counters."""
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
) -> AsyncIterator[OpenTeacher]:
    """Connects, and checks that every replica has the same model."""
    if len(urls) == 1:
        async with await connect(urls[0], dialect=dialect, model=model, api_key=api_key, config=config) as client:
            info = await client.server_info()
            yield OpenTeacher(client, info.model, info.max_model_len)
        return
    if dialect == "auto":
        async with await connect(urls[0], dialect=dialect, model=model, api_key=api_key, config=config) as client:
            dialect = client.dialect
    if dialect not in DIALECTS:
        raise ConfigError(
            "a fleet of replicas speaks vLLM only", where=", ".join(urls), got=dialect, hint="give one URL"
        )
    async with Fleet(urls, make=DIALECTS[dialect], config=config, model=model, api_key=api_key) as fleet:
        infos = [await replica.client.server_info() for replica in fleet.replicas]
        names = {info.model for info in infos}
        if len(names) > 1:
            raise ConfigError("the replicas serve different models", where=", ".join(urls), got=sorted(names))
        lengths = [info.max_model_len for info in infos if info.max_model_len is not None]
        yield OpenTeacher(fleet, infos[0].model, min(lengths, default=None), fleet)
