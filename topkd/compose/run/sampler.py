"""Opens the sampler of a run: the learner's model, a server that loads its weights, or vLLM in this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import InProcessSampling, ServerSampling, VllmSampling
from topkd.compose.data.prompts import Prompts
from topkd.compose.preflight.lengths import list_stop_ids
from topkd.compose.preflight.preflight import require_weight_sync
from topkd.compose.run.run import Run
from topkd.engine import EngineConfig
from topkd.engine.loop.hooks import Record
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import Ids, Sampler, Version, WeightUpdate
from topkd.topk.samples import Rollout, SamplingParams

if TYPE_CHECKING:
    from topkd.clients import VllmInProcess
    from topkd.engine.weight_sync.sync import Destination

KEPT_ADAPTERS = 2  # the last one may still be in use while the next is loaded


@contextlib.asynccontextmanager
async def open_sampler(config: RunConfig, student: Any, prompts: Prompts, run: Run) -> AsyncIterator[SamplingSetup]:
    """Open the sampler of this run's rollouts; at the end of the run, a server gets its former state back."""
    table = config.sampler
    if isinstance(table, InProcessSampling):
        yield open_in_process(config, student, prompts.tokenizer)
        return
    from topkd.engine.weight_sync.sync import SyncedSampler, SyncProbe

    kind = _find_kind(table, student)
    if isinstance(table, ServerSampling):
        opened = _open_server(table, config, kind, student.vocab_size, KEPT_ADAPTERS + config.max_staleness)
    else:
        run.progress.note("starting vLLM in the learner's process")
        opened = _open_engine(table, config, kind, student)
    async with opened as destination:
        sampler = SyncedSampler(
            student,
            destination,
            folder=run.out / "weights" if table.folder is None else Path(table.folder),
            probe=SyncProbe.of(
                student, [row.prompt_ids for row in prompts.rows], alarm_nats=table.alarm_kl, limit_nats=table.limit_kl
            ),
            stop_ids=list_stop_ids(prompts.tokenizer),
            every=table.sync_every,
        )
        with contextlib.closing(sampler):
            yield SamplingSetup(
                sampler, sampler.publish, sampler.lock, sampler.capture, destination.publish_while_sampling
            )


def _find_kind(table: ServerSampling | VllmSampling, student: Any) -> Literal["lora", "full"]:
    if table.weights == "lora" and not student.lora:
        raise ConfigError('sampler.weights is "lora", but the student trains no adapter', hint="add [student.lora]")
    if table.weights == "auto":
        return "lora" if student.lora else "full"
    return table.weights


@contextlib.asynccontextmanager
async def _open_server(
    table: ServerSampling, config: RunConfig, kind: Literal["lora", "full"], vocab_size: int, keep: int
) -> AsyncIterator[Destination]:
    from topkd.clients.connection import open_client
    from topkd.clients.dialects.base import ScoringClient
    from topkd.engine.weight_sync.sync import Destination

    key, address = table.api_key(), table.url
    async with contextlib.AsyncExitStack() as stack:
        client = await open_client(address, dialect=table.dialect, model=table.model, api_key=key, config=config.client)
        await stack.enter_async_context(client)
        dialect = require_weight_sync(client)
        if not isinstance(client, ScoringClient):
            raise TypeError(f"{type(client).__name__} can load weights, but cannot score")
        client.vocab_size = vocab_size
        model = await client.model_name()
        sink = await stack.enter_async_context(
            dialect.load_sink()(address, model=model, api_key=key, config=config.client, keep_adapters=keep)
        )
        stack.push_async_callback(sink.unload)

        def sampler(_: WeightUpdate) -> Sampler:
            return client.under(sink.sampling_model or model)

        lora = kind == "lora"
        yield Destination(
            sink,
            sampler,
            sink.weight_version,
            client.where(),
            kind,
            keep=keep if lora else 1,
            publish_while_sampling=lora,
        )


@contextlib.asynccontextmanager
async def _open_engine(
    table: VllmSampling, config: RunConfig, kind: Literal["lora", "full"], student: Any
) -> AsyncIterator[Destination]:
    from topkd.clients import VllmInProcess
    from topkd.engine.weight_sync.sync import Destination

    settings: dict[str, Any] = {
        "dtype": config.student.dtype if table.dtype == "auto" else table.dtype,
        "gpu_memory_utilization": table.memory_fraction,
        "enable_sleep_mode": table.sleep,
        "enforce_eager": table.enforce_eager,
        "max_model_len": table.max_model_len,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "seed": config.seed,
    }
    if kind == "lora":
        rank = max((adapter.r for adapter in student.model.peft_config.values()), default=8)
        settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": 1 << max(3, (rank - 1).bit_length())}

    def start() -> VllmInProcess:
        return VllmInProcess(config.student.model, vocab_size=student.vocab_size, **settings)

    async with await asyncio.to_thread(start) as engine:

        async def weights() -> Version:
            return engine.version

        sink = _Sleeper(engine) if table.sleep else engine
        yield Destination(sink, lambda _: sink, weights, "vLLM in this process", kind)


class _Sleeper:
    """An engine that holds the device's memory only while it samples or loads weights."""

    def __init__(self, engine: VllmInProcess) -> None:
        self._engine, self._awake, self._busy = engine, True, 0
        self._turn = asyncio.Lock()

    async def push(self, update: WeightUpdate) -> Version:
        """See ``WeightSink``."""
        async with self._up():
            return await self._engine.push(update)

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """See ``Sampler``."""
        async with self._up():
            return await self._engine.sample(prompt_ids, n, params, k=k)

    @contextlib.asynccontextmanager
    async def _up(self) -> AsyncIterator[None]:
        self._busy += 1
        async with self._turn:
            if not self._awake:
                await self._engine.wake()
                self._awake = True
        try:
            yield
        finally:
            self._busy -= 1
            async with self._turn:
                if not self._busy and self._awake:
                    await self._engine.sleep()
                    self._awake = False


@dataclass(frozen=True, slots=True)
class SamplingSetup:
    """A sampler, and how it gets new weights.

    Attributes:
        sampler: Samples the rollouts.
        publish: Sends weight version v to the sampler (see ``Hooks.publish``).
        lock: The learner holds it while weights change; an in-process sampler holds it while it reads them.
        capture: Copies a version for ``publish`` (see ``Hooks.capture``), if the sampler has its own weights.
        publish_while_sampling: Whether the sampler can hold several versions (see ``Hooks``).
    """

    sampler: Sampler
    publish: Callable[[int], Awaitable[Record | None]]
    lock: threading.Lock = field(default_factory=threading.Lock)
    capture: Callable[[int], None] | None = None
    publish_while_sampling: bool = False

    def drawing_from(self, sampler: Sampler) -> SamplingSetup:
        """Return the setup with another sampler, which uses this one or replaces it."""
        return replace(self, sampler=sampler)


def open_in_process(config: EngineConfig, student: Any, tokenizer: Any) -> SamplingSetup:
    """Sample from the learner's own model in this process, which always has the new weights."""
    from topkd.engine.models.sampler import InProcessSampler

    sampler = InProcessSampler(
        student, stop_ids=list_stop_ids(tokenizer), batch_size=config.rollout.batch_size, shown_k=config.k
    )

    async def publish(version: int) -> None:
        sampler.version = str(version)

    return SamplingSetup(sampler, publish, sampler.lock)
