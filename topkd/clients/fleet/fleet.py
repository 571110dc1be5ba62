"""Several replicas of one teacher as one: fail-over, circuits, hedges, and the test that they agree."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np

from topkd.clients.config import ClientConfig
from topkd.clients.decoding.sampled import draw_seed
from topkd.clients.dialects.base import ScoringClient, ServerInfo
from topkd.clients.dialects.records import list_dialects
from topkd.clients.dialects.vllm import VllmCompletions
from topkd.clients.fleet.routing import Breaker, Hedging
from topkd.clients.http.admission import MemoryBudget
from topkd.clients.http.metrics import Metrics
from topkd.clients.http.retry import PauseBudget, Total, Try, with_retries
from topkd.topk.errors import (
    ConfigError,
    ResponseError,
    RetryableServerError,
    ServerBusyError,
    ServerPausedError,
    ServerUnreachableError,
    UnsupportedError,
)
from topkd.topk.protocols import CandidateScorer, Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Float32, Int32, TopK

Result = TypeVar("Result")
Ask = Callable[[ScoringClient], Awaitable[Result]]
_SMOOTHING = 0.2  # of a replica's seconds per reply
_COMPARED = tuple(range(1, 9))  # ids that any vocabulary has


class Replica:
    """A client and what the fleet knows of it."""

    def __init__(self, client: ScoringClient, config: ClientConfig) -> None:
        self.client, self.breaker = client, Breaker(config)
        self.seconds = 0.0  # smoothed seconds per request; 0 until the first reply, so that a new one is tried at once

    @property
    def url(self) -> str:
        """Return the base URL."""
        return self.client.endpoint.url

    def expected_wait(self) -> float:
        """Estimate what a new request would wait here: load times speed."""
        return (self.client.endpoint.gate.load + 1) * (self.seconds + 1e-9)

    def answered(self, seconds: float) -> None:
        """Record a request that came back whole."""
        self.breaker.success()
        self.seconds += (1.0 if self.seconds == 0.0 else _SMOOTHING) * (seconds - self.seconds)


class Fleet:
    """A TeacherScorer, CandidateScorer and Sampler over replicas that serve the same model.

    Each try goes to the least loaded replica whose circuit is closed; a failed try goes to another one. The replicas
    share one memory budget and one set of counters; each has its own adaptive window. With ``hedge_share`` a score that
    is slower than most is asked of a second replica too, and the loser is cancelled.

    Args:
        urls: Base URLs of the replicas.
        make: Class of the clients, or one for each URL: any dialect that scores.
        config: As for one client; its retries count over all replicas.
        options: Passed to ``make`` (model, api_key, vocab_size, ...).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        make: type[ScoringClient] | Sequence[type[ScoringClient]] = VllmCompletions,
        config: ClientConfig | None = None,
        **options: Any,
    ) -> None:
        if not urls or len(set(urls)) != len(urls):
            raise ConfigError("a fleet needs distinct replica URLs", got=list(urls))
        self.config = config or ClientConfig()
        self.metrics_ = Metrics()
        budget = MemoryBudget(self.config.budget_token_k)
        # One owner of retries: the fleet's. A replica's client makes single tries, and does not wait out a pause.
        single = self.config.model_copy(update={"max_retries": 0, "response_retries": 0, "pause_timeout_s": 0.0})
        makes = [make] * len(urls) if isinstance(make, type) else list(make)
        if len(makes) != len(urls):
            raise ConfigError("a fleet needs one client class, or one for each URL", got=len(makes), expected=len(urls))
        self.replicas = [
            Replica(attempt_info(url, config=single, budget=budget, metrics=self.metrics_, **options), self.config)
            for url, attempt_info in zip(urls, makes, strict=True)
        ]
        self._hedging = Hedging(self.config.hedge_share)
        self._probes: set[asyncio.Task[None]] = set()
        self._busy = 0
        self._idle = asyncio.Event()
        self._closing = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    @property
    def metrics(self) -> dict[str, float]:
        """Count over all replicas, and show each replica's window, load and circuit."""
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
        """Score, as ``TeacherScorer``, from whichever replica answers."""
        return await self._run(
            lambda client: client.score(ids, start, k),
            response_retries=max(1, self.config.response_retries),
            tokens=len(ids),
        )

    async def score_candidates(self, ids: Ids, start: int, candidates: Int32) -> Float32:
        """Score candidates, as ``CandidateScorer``; an UnsupportedError where the dialect scores none."""

        async def ask(client: ScoringClient) -> Float32:
            if not isinstance(client, CandidateScorer):
                raise UnsupportedError(
                    "this dialect scores no candidates", where=client.where(), got=client.dialect,
                    expected=" or ".join(list_dialects(candidates=True)[1:]),
                )  # fmt: skip
            return await client.score_candidates(ids, start, candidates)

        return await self._run(ask, response_retries=max(1, self.config.response_retries), tokens=len(ids))

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Draw, as ``Sampler``; the seed is drawn once, so that another replica draws the same."""
        seeded = draw_seed(params)
        return await self._run(lambda client: client.sample(prompt_ids, n, seeded, k=k), response_retries=0)

    async def check_replicas(self) -> ServerInfo:
        """Check that all replicas serve one model and score alike.

        Raises:
            ConfigError: they serve different models.
            ResponseError: they serve one name with different weights; see ``agreement``.
        """
        info = await self.server_info()
        await self.agreement(_COMPARED, 0, 1)
        return info

    async def server_info(self) -> ServerInfo:
        """Ask all replicas: one model, the shortest of their contexts."""
        infos = await asyncio.gather(*(replica.client.server_info() for replica in self.replicas))
        names = sorted({info.model for info in infos})
        if len(names) > 1:
            urls = ", ".join(replica.url for replica in self.replicas)
            raise ConfigError("the replicas serve different models", where=urls, got=", ".join(names))
        lengths = [info.max_model_len for info in infos if info.max_model_len is not None]
        return ServerInfo(infos[0].model, min(lengths, default=None), infos[0].version, infos[0].models)

    async def agreement(self, ids: Ids, start: int, k: int, *, tolerance_nats: float = 0.005) -> float:
        """Compare the replicas: return the largest difference in the realised logprobs of ``ids``.

        Raises:
            ResponseError: the difference is above ``tolerance_nats``: they do not serve the same weights (or one is
                broken in a way that no single reply shows).
        """
        scores = await asyncio.gather(
            *(self._outlast(partial(replica.client.score, ids, start, k), replica) for replica in self.replicas)
        )
        logp = np.stack([score.actual_logp for score in scores]).astype(np.float64)
        high_logp, low_logp = logp.max(axis=0), logp.min(axis=0)
        # Two zeros agree; subtracted they would be a nan, behind which every other row could hide.
        spread = np.subtract(high_logp, low_logp, out=np.zeros_like(high_logp), where=high_logp != low_logp)
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
        """Refuse new requests and wait for those under way."""
        self._closing = True
        while self._busy:
            await self._idle.wait()

    async def aclose(self) -> None:
        """Close every replica and end the probes; those of other event loops end there."""
        self._closing = True
        own = self._own_probes()
        for probe in self._probes.difference(own):
            with contextlib.suppress(RuntimeError):  # its loop is closed
                probe.get_loop().call_soon_threadsafe(probe.cancel)
        for probe in own:
            probe.cancel()
        await asyncio.gather(*own, return_exceptions=True)
        await asyncio.gather(*(replica.client.aclose() for replica in self.replicas))

    async def _run(self, ask: Ask[Result], *, response_retries: int, tokens: int = 0) -> Result:
        """Send one request; with ``tokens`` it is a score, which may be hedged."""
        if self._closing:
            raise ConfigError("the fleet is closed")
        failed: set[int] = set()

        async def attempt(attempt_info: Try) -> Result:
            clock = asyncio.get_running_loop().time
            begun = clock()
            result = await self._ask_unpaused(
                attempt_info, ask, failed, self._hedging.patience_s(tokens) if tokens else None
            )
            if tokens:
                self._hedging.answered(clock() - begun, tokens)
            if attempt_info.number:
                self.metrics_.add("failovers")
            return result

        self._busy += 1
        self._idle.clear()
        try:
            return await with_retries(
                attempt, self.config, self.metrics_, response_retries=response_retries, is_paused=self._all_paused
            )
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    async def _ask_unpaused(
        self, attempt_info: Try, ask: Ask[Result], failed: set[int], patience_s: float | None
    ) -> Result:
        """Try replicas until one is not paused: another one may take what this one does not."""
        paused: set[int] = set()
        while True:
            number = await self._pick(attempt_info, failed, paused)
            try:
                if patience_s is None:
                    return await self._ask(number, ask, failed)
                return await self._hedged(number, ask, failed, patience_s)
            except ServerPausedError:
                paused.add(number)
                if all(n in paused for n, replica in enumerate(self.replicas) if replica.breaker.closed):
                    raise

    async def _all_paused(self) -> bool:
        """Ask every replica that answers whether it is paused."""
        asked = [replica.client.endpoint for replica in self.replicas if replica.breaker.closed]
        return all(await asyncio.gather(*(endpoint.is_paused() for endpoint in asked)))

    async def _outlast(self, call: Callable[[], Awaitable[Result]], replica: Replica) -> Result:
        """Ask this very replica, once it is not paused."""
        pauses = PauseBudget(self.config, self.metrics_, replica.client.endpoint.is_paused)
        return await pauses.outlast(lambda _: call(), Try(0, Total(self.config.total_timeout_s)))

    async def _ask(self, number: int, ask: Ask[Result], failed: set[int]) -> Result:
        """Try one replica, and record how it did."""
        replica = self.replicas[number]
        begun = asyncio.get_running_loop().time()
        try:
            result = await ask(replica.client)
        except ServerPausedError:
            raise  # its weights are being changed: it does not fail
        except (RetryableServerError, ResponseError) as error:
            failed.add(number)
            if not isinstance(error, ServerBusyError) and replica.breaker.failure():
                self.metrics_.add("circuits_opened")
            raise
        replica.answered(asyncio.get_running_loop().time() - begun)
        return result

    async def _hedged(self, number: int, ask: Ask[Result], failed: set[int], patience_s: float) -> Result:
        """Try one replica, and a second one too when it takes longer than ``patience_s``."""
        first = asyncio.create_task(self._ask(number, ask, failed))
        tasks = [first]
        try:
            await asyncio.wait(tasks, timeout=patience_s)
            other = None if first.done() else self._spare(number, failed)
            if other is not None and self._hedging.spend():
                self.metrics_.add("hedges")
                tasks.append(asyncio.create_task(self._ask(other, ask, failed)))
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                settled = next(task for task in tasks if task.done())
                # A failed try is not the answer while the other may still give one; a refusal would be the same there.
                if not settled.cancelled() and isinstance(settled.exception(), (RetryableServerError, ResponseError)):
                    settled = tasks[1 - tasks.index(settled)]
                result = await settled
                self.metrics_.add("hedges_won", settled is not first)
                return result
            return await first
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _spare(self, number: int, failed: set[int]) -> int | None:
        """Find another replica with a free place; None when all have enough to do."""
        free = [
            n
            for n, replica in enumerate(self.replicas)
            if n != number and n not in failed and replica.breaker.closed and replica.client.endpoint.gate.free
        ]
        return min(free, key=lambda n: self.replicas[n].expected_wait(), default=None)

    async def _pick(self, attempt_info: Try, failed: set[int], paused: set[int]) -> int:
        """Choose the replica for the next try; wait for a probe when every circuit is open."""
        while True:
            closed = [n for n, replica in enumerate(self.replicas) if replica.breaker.closed]
            closed = [n for n in closed if n not in paused] or closed
            for replica in self.replicas:
                if replica.breaker.due:
                    replica.breaker.probe()
                    task = asyncio.create_task(self._probe(replica))
                    self._probes.add(task)
                    task.add_done_callback(self._probes.discard)
            if closed:
                fresh = [n for n in closed if n not in failed] or closed
                return min(fresh, key=lambda n: self.replicas[n].expected_wait())
            attempt_info.total.start()
            pause = min(replica.breaker.seconds_to_probe() for replica in self.replicas) + 0.02
            if pause >= attempt_info.total.remaining_s:
                raise ServerUnreachableError(
                    f"all {len(self.replicas)} replicas are down", where=", ".join(r.url for r in self.replicas)
                )
            if own := self._own_probes():
                await asyncio.wait(own, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(pause)

    def _own_probes(self) -> set[asyncio.Task[None]]:
        """Find the probes of the running event loop: only those can be awaited in it."""
        return {probe for probe in self._probes if probe.get_loop() is asyncio.get_running_loop()}

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
