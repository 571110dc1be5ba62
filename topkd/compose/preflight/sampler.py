"""The student's server, met before a model is opened: is it there, has it the model, can its weights be changed?"""

from __future__ import annotations

from topkd.clients.connection import open_client
from topkd.clients.dialects.base import Wire
from topkd.clients.dialects.records import find_dialect
from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import ServerSampling
from topkd.compose.preflight.teachers import shorten_patience
from topkd.topk.errors import UnsupportedError

_HINTS = {
    "full": "start vLLM with VLLM_SERVER_DEV_MODE=1, or train an adapter: [student.lora]",
    "lora": "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
}


async def check_sampler(config: RunConfig) -> str:
    """What the server of ``[sampler]`` is, in a line; "" where the student is sampled in this process.

    Raises:
        ServerUnreachableError, ModelNotFoundError: It is not there, or another.
        UnsupportedError: Weights cannot be brought to it.
    """
    table = config.sampler
    if not isinstance(table, ServerSampling):
        return ""
    by_adapter = table.weights == "lora" or (table.weights == "auto" and config.student.lora is not None)
    async with await open_client(
        table.url,
        dialect=table.dialect,
        model=table.model,
        api_key=table.api_key(),
        config=shorten_patience(config.client),
    ) as client:
        info = await client.server_info()
        dialect = find_dialect(client.dialect)
        if not dialect.syncs:
            raise UnsupportedError(
                "this server's weights cannot be changed, so a student that learns cannot be sampled from it",
                where=client.where(), got=f"dialect {client.dialect}", expected="vLLM, SGLang or topkd serve",
            )  # fmt: skip
        wire, way = Wire(client), "lora" if by_adapter else "full"
        missing = [route for route in dialect.load_sink().routes[way] if not await wire.mounted(route)]
        if missing:
            raise UnsupportedError(
                "the student's server does not take " + ("adapters" if by_adapter else "new weights"),
                where=client.where(), got=f"no route {missing[0]}", hint=_HINTS[way],
            )  # fmt: skip
        how = "by adapters" if by_adapter else "by reloads"
        return f"the student is sampled at {table.url} ({info.model}, {client.dialect}), its weights follow {how}"
