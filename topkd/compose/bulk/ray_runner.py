"""Score on a Ray cluster: many workers write into one store, each into its own segment.

Ray Data distributes chunks of the data file. If a worker dies, another one gets its chunk and finds in the store what
the dead one has written. Every worker must be able to read the data file and to write to the folder of the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from topkd.compose.bulk.config import ScoreConfig, ScoreReport
from topkd.compose.bulk.job import Claim, SpendingLimit, load_text_tokenizer, sum_counters
from topkd.compose.bulk.score_job import ScoreJob, Selection, build_queues, open_job_teacher
from topkd.compose.data.files import RowChunk, group_chunks
from topkd.compose.data.sequences import iter_chunks
from topkd.compose.progress import Progress
from topkd.compose.teachers.served import OpenTeacher
from topkd.offline import ScoreStore
from topkd.topk.errors import ConfigError, TopkdError

_REACH_S = 5.0  # time-out of a connection to the head of a cluster
_SEALING_S = 5.0  # longest wait until dead workers have released their segments


class Ledger:
    """The claims of a whole job: which chunk requests which sequence, and what the caps still allow.

    It keeps 16 bytes for every claimed sequence, so that equal rows in two chunks are requested once. A chunk that
    another worker repeats keeps its claims; tokens that its first worker may have sent stay counted.
    """

    def __init__(self, config: ScoreConfig) -> None:
        self.limit = SpendingLimit(config.caps())
        self.owners: dict[bytes, int] = {}

    def claim(self, chunk: int, requests: Sequence[tuple[bytes, int]]) -> list[Claim]:
        """Decide on each (digest, tokens) of a chunk; ``chunk`` is the number of its first row."""
        return [
            Claim.ELSEWHERE if self.owners.setdefault(digest, chunk) != chunk else self.limit.claim_tokens(tokens)
            for digest, tokens in requests
        ]

    def get_reached(self) -> str:
        """Return the name of the cap that was reached; "" if none was."""
        return self.limit.reached


class ScoreWorker:
    """A Ray actor that scores one chunk per call, with its own connections and its own segment of the store.

    Args:
        config: Config of the whole job, with absolute paths.
        ledger: A handle of the job's ``Ledger`` actor.
    """

    def __init__(self, config: ScoreConfig, ledger: Any) -> None:
        each = max(1, -(-config.in_flight // config.workers))
        self.config, self.ledger, self.name = config.model_copy(update={"in_flight": each}), ledger, uuid.uuid4().hex
        self._runner, self._open = asyncio.Runner(), contextlib.AsyncExitStack()
        self._teachers: dict[str, OpenTeacher] | None = None
        self._store: ScoreStore | None = None
        self._tokenizer: Any = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Score the chunk that a row describes; return its report, and the error that ends the job, if any."""
        chunk = RowChunk(*(int(batch[name][0]) for name in ("first", "rows", "line", "offset")))
        report, error = ScoreReport(str(self.config.out), k=self.config.k), None
        try:
            self._runner.run(self._score(chunk, report))
        except TopkdError as reason:
            error = reason
        counters = sum_counters(teacher.metrics() for teacher in (self._teachers or {}).values())
        result = pickle.dumps((self.name, report, error, counters))
        return {"result": np.array([result], dtype=object)}

    async def _score(self, chunk: RowChunk, report: ScoreReport) -> None:
        if self._teachers is None:
            self._tokenizer = load_text_tokenizer(self.config.tokenizer)
            self._teachers = {name: await self._open.enter_async_context(open_job_teacher(self.config, address))
                              for name, address in self.config.addresses().items()}  # fmt: skip
            self._store = ScoreStore(self.config.out, mode="a", codec=self.config.codec)
        assert self._store is not None  # noqa: S101 - opened with the teachers
        self._store.refresh()  # finds what other workers wrote, above all one that died on this chunk
        report.teacher = ", ".join(dict.fromkeys(teacher.name for teacher in self._teachers.values()))
        queues = build_queues(self.config, self._teachers, self._store)
        budget = _LedgerBudget(self.ledger, chunk.first)
        job = ScoreJob(self.config, report=report, progress=Progress(), store=self._store, queues=queues, budget=budget)
        try:
            await job.score(Selection(self.config, self._tokenizer, chunk))
        finally:
            job.complete_report()
            await asyncio.to_thread(self._store.commit)


class _LedgerBudget:
    """The ``RequestBudget`` of a chunk: it asks the ledger."""

    def __init__(self, ledger: Any, chunk: int) -> None:
        self._ledger, self._chunk, self.reached = ledger, chunk, ""

    async def claim(self, requests: Sequence[tuple[bytes, int]]) -> list[Claim]:
        claims: list[Claim] = await self._ledger.claim.remote(self._chunk, list(requests))
        if Claim.CAP in claims:
            self.reached = await self._ledger.get_reached.remote()
        return claims


async def score_on_ray(config: ScoreConfig, progress: Progress) -> ScoreReport:
    """Score on a Ray cluster.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be joined.
        TopkdError: The same errors as on one machine.
    """
    config = config.model_copy(update={"data": config.data.absolute(), "out": config.out.absolute()})
    chunks = await asyncio.to_thread(
        lambda: group_chunks(iter_chunks(config.data), workers=config.workers, limit=config.limit)
    )
    report = ScoreReport(str(config.out), k=config.k)
    with ScoreStore(config.out, mode="a", codec=config.codec):
        pass  # a folder that cannot be written is reported here, not by every worker
    if not chunks:
        return report
    total = -(-sum(chunk.rows for chunk in chunks) // config.shard[1])
    counters: dict[str, dict[str, float]] = {}
    began = time.monotonic()
    with _join_cluster(config) as ray:
        progress.note(f"{len(chunks)} chunks for {config.workers} workers")
        progress.stage("score", total)
        ledger = ray.remote(Ledger).options(num_cpus=0).remote(config)
        try:
            async for result in _iter_results(config, chunks, ledger):
                worker, part, error, counters[worker] = pickle.loads(result)  # noqa: S301 - our own workers wrote it
                report.add(part)
                if error is not None:
                    raise error
                detail = f"{report.tokens_sent / max(time.monotonic() - began, 1e-9):.0f} tok/s"
                progress.advance(report.rows + report.duplicates + report.skipped, detail)
        except asyncio.CancelledError:
            progress.note(f"stopped: the scores are kept in {config.out}; run the same command again to continue")
            raise
        finally:
            report.client = sum_counters(counters.values())
            ray.kill(ledger)
    await asyncio.to_thread(_seal, config)
    return report


async def _iter_results(config: ScoreConfig, chunks: Sequence[RowChunk], ledger: Any) -> AsyncIterator[bytes]:
    """Yield the pickled result of each chunk when it is done."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    items = ray.data.from_items([asdict(chunk) for chunk in chunks], override_num_blocks=len(chunks))
    result = items.map_batches(
        ScoreWorker,
        fn_constructor_args=(config, ledger),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(chunks))),
        num_cpus=1,
        num_gpus=config.gpus_per_worker or None,
    )
    rows: Iterator[Mapping[str, Any]] = iter(result.iter_rows())
    while (row := await asyncio.to_thread(next, rows, None)) is not None:
        yield row["result"]


@contextlib.contextmanager
def _join_cluster(config: ScoreConfig) -> Iterator[Any]:
    """Join or start a Ray cluster; stop the one that was started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else Ray prints an error for every actor
    try:
        import ray
    except ImportError as error:
        raise ConfigError("the Ray runner is not installed", hint='pip install "topkd[ray]"') from error
    if ray.is_initialized():
        yield ray
        return
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _check_reachable(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", num_cpus=config.workers, include_dashboard=False, **quiet)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "cannot join the Ray cluster" if address else "cannot start Ray", where=address or "this machine",
            got=str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__,
        ) from error  # fmt: skip
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at the address: Ray itself would wait for ever."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():  # else it is a name that Ray resolves on this machine ("auto")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()


def _seal(config: ScoreConfig) -> None:
    """Seal the segments of the workers as soon as they are released; Ray kills workers before they can do it."""
    until = time.monotonic() + _SEALING_S
    while time.monotonic() < until:
        with ScoreStore(config.out, mode="a", codec=config.codec):
            pass
        if all(path.with_suffix(".idx").exists() for path in config.out.glob("seg-*.tkl")):
            return
        time.sleep(0.2)
