"""Several replicas of one teacher as one: routing, fail-over, circuits, and the test that they agree."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from topkd.clients.breaker import Breaker
from topkd.clients.config import ClientConfig
from topkd.clients.limits import Budget
from topkd.clients.metrics import Metrics
from topkd.clients.retry import Try, with_retries
from topkd.clients.sampled import sent
from topkd.clients.vllm import VllmCompletions
from topkd.topk.errors import (
    ConfigError,
    ResponseError,
    RetryableServerError,
    ServerBusyError,
    ServerUnreachableError,
)
from topkd.topk.protocols import Ids, TeacherScorer
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import TopK

Result = TypeVar("Result")
_SMOOTHING = 0.2  # of a replica's seconds per reply


class Replica:
    """A client and what the fleet knows of it."""

    def __init__(self, client: VllmCompletions, config: ClientConfig) -> None:
        self.client, self.breaker = client, Breaker(config)
        self.seconds = 0.0  # smoothed seconds per request; 0 until the first reply, so that a new one is tried at once

    @property
    def url(self) -> str:
        """Base URL."""
        return self.client.endpoint.url

    def expected_wait(self) -> float:
        """Load times speed: what a new request would wait here."""
        return (self.client.endpoint.gate.load + 1) * (self.seconds + 1e-9)

    def answered(self, seconds: float) -> None:
        """A request came back whole."""
        self.breaker.success()
        self.seconds += (1.0 if self.seconds == 0.0 else _SMOOTHING) * (seconds - self.seconds)


class Fleet:
    """A TeacherScorer and Sampler over replicas that serve the same model.

    Each try goes to the least loaded replica whose circuit is closed; a failed try goes to another one. The replicas
    share one memory budget and one set of counters; each has its own adaptive window.

    Args:
        urls: Base URLs of the replicas.
        make: Class of the clients.
        config: As for one client; its retries count over all replicas.
        options: Passed to ``make`` (model, api_key, vocab_size, ...).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        make: type[VllmCompletions] = VllmCompletions,
        config: ClientConfig | None = None,
        **options: Any,
    ) -> None:
        if not urls or len(set(urls)) != len(urls):
            raise ConfigError("a fleet needs distinct replica URLs", got=list(urls))
        self.config = config or ClientConfig()
        self.metrics_ = Metrics()
        budget = Budget(self.config.budget_token_k)
        # One owner of retries: the fleet's. A replica's client makes single tries.
        single = self.config.model_copy(update={"max_retries": 0, "response_retries": 0})
        self.replicas = [
            Replica(make(url, config=single, budget=budget, metrics=self.metrics_, **options), self.config)
            for url in urls
        ]
        self._probes: set[asyncio.Task[None]] = set()
        self._busy = 0
        self._idle = asyncio.Event()
        self._closing = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def metrics(self) -> dict[str, float]:
        """Counters over all replicas, and each replica's window, load and circuit."""
        out = self.metrics_.snapshot()
        for number, replica in enumerate(self.replicas):
            gate = replica.client.endpoint.gate
            out |= {
                f"replica_{number}_window": float(gate.window.size),
                f"replica_{number}_load": float(gate.load),
                f"replica_{number}_closed": float(replica.breaker.closed),
            }
        return out

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """As ``VllmCompletions.score``, from whichever replica answers."""
        return await self._run(
            lambda client: client.score(ids, start, k), response_retries=max(1, self.config.response_retries)
        )

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """As ``VllmCompletions.sample``; the seed is drawn once, so that another replica draws the same."""
        seeded = params if params.seed is not None else sent(params, secrets.randbelow(2**31))
        return await self._run(lambda client: client.sample(prompt_ids, n, seeded, k=k), response_retries=0)

    async def agreement(self, ids: Ids, start: int, k: int, *, tolerance_nats: float = 0.005) -> float:
        """Largest difference in the realised logprobs of ``ids`` between any two replicas.

        Raises:
            ResponseError: the difference is above ``tolerance_nats``: they do not serve the same weights (or one is
                broken in a way that no single reply shows).
        """
        scores = await asyncio.gather(*(replica.client.score(ids, start, k) for replica in self.replicas))
        logp = np.stack([score.actual_logp for score in scores]).astype(np.float64)
        spread = logp.max(axis=0) - logp.min(axis=0)
        worst = int(np.argmax(spread))
        if spread[worst] > tolerance_nats:
            low, high = (self.replicas[int(i)].url for i in (logp[:, worst].argmin(), logp[:, worst].argmax()))
            raise ResponseError(
                "replicas disagree",
                where=f"{low} and {high}, row {worst}",
                got=f"{spread[worst]:.4g} nats apart",
                expected=f"at most {tolerance_nats}",
                hint="do they serve the same weights and precision? raise tolerance_nats if the hardware differs",
            )
        return float(spread[worst])

    async def drain(self) -> None:
        """Refuses new requests and waits for those under way."""
        self._closing = True
        while self._busy:
            await self._idle.wait()

    async def aclose(self) -> None:
        """Ends probes and closes every replica."""
        self._closing = True
        probes = list(self._probes)
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        await asyncio.gather(*(replica.client.aclose() for replica in self.replicas))

    async def _run(self, ask: Callable[[VllmCompletions], Awaitable[Result]], *, response_retries: int) -> Result:
        if self._closing:
            raise ConfigError("the fleet is closed")
        failed: set[int] = set()

        async def attempt(one: Try) -> Result:
            number = await self._pick(one, failed)
            replica = self.replicas[number]
            begun = asyncio.get_running_loop().time()
            try:
                result = await ask(replica.client)
            except (RetryableServerError, ResponseError) as error:
                failed.add(number)
                if not isinstance(error, ServerBusyError) and replica.breaker.failure():
                    self.metrics_.add("circuits_opened")
                raise
            replica.answered(asyncio.get_running_loop().time() - begun)
            if one.number:
                self.metrics_.add("failovers")
            return result

        self._busy += 1
        self._idle.clear()
        try:
            return await with_retries(attempt, self.config, self.metrics_, response_retries=response_retries)
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    async def _pick(self, one: Try, failed: set[int]) -> int:
        """The replica for the next try; waits for a probe when every circuit is open."""
        while True:
            closed = [n for n, replica in enumerate(self.replicas) if replica.breaker.closed]
            for replica in self.replicas:
                if replica.breaker.due:
                    replica.breaker.probe()
                    task = asyncio.create_task(self._probe(replica))
                    self._probes.add(task)
                    task.add_done_callback(self._probes.discard)
            if closed:
                fresh = [n for n in closed if n not in failed] or closed
                return min(fresh, key=lambda n: self.replicas[n].expected_wait())
            one.total.start()
            pause = min(replica.breaker.seconds_to_probe() for replica in self.replicas) + 0.02
            if pause >= one.total.remaining_s:
                raise ServerUnreachableError(
                    f"all {len(self.replicas)} replicas are down", where=", ".join(r.url for r in self.replicas)
                )
            if self._probes:
                await asyncio.wait(self._probes, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(pause)

    async def _probe(self, replica: Replica) -> None:
        self.metrics_.add("probes")
        alive = False
        try:
            alive = await replica.client.healthy()
        finally:
            if alive:
                replica.breaker.success()
                self.metrics_.add("circuits_closed")
            else:
                replica.breaker.failure()


class TeacherRouter:
    """Teachers by ``teacher_id``. An id that nobody is mapped to is an error, never a default teacher."""

    def __init__(self, teachers: Mapping[str, TeacherScorer]) -> None:
        self._teachers = dict(teachers)

    def route(self, teacher_id: str) -> TeacherScorer:
        """The teacher of that id."""
        try:
            return self._teachers[teacher_id]
        except KeyError:
            raise ConfigError(
                "no teacher is mapped to this teacher_id",
                got=repr(teacher_id),
                expected=" or ".join(map(repr, sorted(self._teachers))) or "an entry in the mapping",
            ) from None

    async def score(self, teacher_id: str, ids: Ids, start: int, k: int) -> TopK:
        """Scores with the teacher of that id."""
        return await self.route(teacher_id).score(ids, start, k)
