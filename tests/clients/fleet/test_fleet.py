"""Replicas as one teacher: fail-over, circuits, agreement, routing, streams."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from tests.fakes.streaming import Job, Stream
from tests.fakes.virtual_time import in_virtual_time
from tests.faults.server import VOCAB, FaultyServer, actual_logp, body_of, plus_a_hundredth, until
from topkd.clients import ClientConfig, Fleet, VllmCompletions
from topkd.clients.fleet.routing import Breaker
from topkd.topk.errors import ConfigError, KLimitError, ResponseError, ServerUnreachableError
from topkd.topk.protocols import Sampler, TeacherScorer

QUICK = ClientConfig(
    connect_timeout_s=60.0,
    read_timeout_s=60.0,
    read_timeout_per_token_s=0.0,
    total_timeout_s=120.0,
    backoff_s=0.01,
    backoff_max_s=0.05,
    breaker_failures=3,
    breaker_cooldown_s=0.2,
)
IDS = [int(i) for i in np.random.default_rng(4).integers(0, VOCAB, 30)]


def prompts(n: int) -> list[list[int]]:
    rng = np.random.default_rng(9)
    return [[int(i) for i in rng.integers(0, VOCAB, 12)] for _ in range(n)]


def jobs(n: int):
    return [Job(i, ids, 3, 4) for i, ids in enumerate(prompts(n))]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_circuit_opens_after_failures_in_a_row_and_lets_one_probe_through():
    clock = Clock()
    breaker = Breaker(ClientConfig(breaker_failures=3, breaker_cooldown_s=5), clock)
    assert [breaker.failure(), breaker.failure()] == [False, False]
    breaker.success()
    assert [breaker.failure(), breaker.failure(), breaker.failure()] == [False, False, True]
    assert not breaker.closed
    assert not breaker.due
    assert breaker.seconds_to_probe() == 5
    clock.now = 5.0
    assert breaker.due
    breaker.probe()
    assert not breaker.due, "one probe at a time"
    assert breaker.failure(), "a failed probe keeps it open for another cool-down"
    assert not breaker.due
    clock.now = 10.0
    breaker.probe()
    breaker.success()
    assert breaker.closed


async def test_a_fleet_is_a_teacher_and_a_sampler():
    async with Fleet(["http://127.0.0.1:1", "http://127.0.0.1:2"]) as fleet:
        assert isinstance(fleet, TeacherScorer)
        assert isinstance(fleet, Sampler)


@in_virtual_time
async def test_load_spreads_over_replicas_and_every_answer_belongs_to_its_question():
    async with FaultyServer() as a, FaultyServer() as b, FaultyServer() as c:
        for server in (a, b, c):
            server.delay_s = 0.01
        async with Fleet([s.url for s in (a, b, c)], model="t", config=QUICK) as fleet:
            results = await asyncio.gather(*(fleet.score(ids, 3, 4) for ids in prompts(60)))
        for ids, topk in zip(prompts(60), results, strict=True):
            assert np.array_equal(topk.actual_logp, actual_logp(ids, 3, 4))
        assert min(s.scored for s in (a, b, c)) >= 12, [s.scored for s in (a, b, c)]


@in_virtual_time
async def test_a_slow_replica_gets_less():
    async with FaultyServer() as fast, FaultyServer() as slow:
        fast.delay_s, slow.delay_s = 0.005, 0.1
        async with Fleet([fast.url, slow.url], model="t", config=QUICK) as fleet:
            async for done in Stream(fleet, jobs(80), limit=16):
                assert done.error is None
        assert slow.scored < fast.scored / 2


async def test_a_failed_try_goes_to_another_replica_and_nothing_is_lost():
    async with FaultyServer(lambda n, r: "500") as bad, FaultyServer() as good:
        async with Fleet([bad.url, good.url], model="t", config=QUICK) as fleet:
            for ids in prompts(20):
                assert np.array_equal((await fleet.score(ids, 3, 4)).actual_logp, actual_logp(ids, 3, 4))
            assert fleet.metrics["circuits_opened"] >= 1
            assert fleet.metrics["failovers"] >= 1
        assert bad.scored < 12, "an open circuit takes no requests"


@pytest.mark.parametrize("fault", ["row_short", "wrong_ids", "nan", "truncated_json", "null_field"])
async def test_a_replica_that_lies_is_left_for_one_that_does_not(fault: str):
    async with (
        FaultyServer(lambda n, r: fault) as bad,
        FaultyServer() as good,
        Fleet([bad.url, good.url], model="t", config=QUICK) as fleet,
    ):
        for ids in prompts(10):
            assert np.array_equal((await fleet.score(ids, 3, 4)).actual_logp, actual_logp(ids, 3, 4))


@in_virtual_time
async def test_a_replica_that_comes_back_is_probed_and_used_again():
    async with (
        FaultyServer() as steady,
        FaultyServer() as comes_back,
        Fleet([comes_back.url, steady.url], model="t", config=QUICK) as fleet,
    ):
        comes_back.plan = lambda n, r: "reset_before_header"
        comes_back.healthy = False
        for ids in prompts(12):
            await fleet.score(ids, 3, 4)
        assert fleet.metrics["replica_0_closed"] == 0.0
        comes_back.plan = lambda n, r: None
        comes_back.healthy = True
        before = comes_back.scored
        for _ in range(100):
            await asyncio.gather(*(fleet.score(ids, 3, 4) for ids in prompts(4)))
            if comes_back.scored > before:
                break
            await asyncio.sleep(0.02)
        assert comes_back.scored > before
        assert fleet.metrics["circuits_closed"] >= 1


@in_virtual_time
async def test_when_all_are_down_the_request_ends_in_its_time_and_names_them():
    config = QUICK.model_copy(update={"total_timeout_s": 1.5, "max_retries": 20})
    async with FaultyServer() as server:
        urls = [server.url, "http://127.0.0.1:1"]
    async with Fleet(urls, model="t", config=config) as fleet:
        async with asyncio.timeout(60):  # twenty retries would take hours: each waits for a circuit to close
            with pytest.raises(ServerUnreachableError):
                await fleet.score(IDS, 3, 4)
            assert fleet.metrics["retries"] < 20, "the total time ended it, not the count"
            with pytest.raises(ServerUnreachableError, match=r"replicas are down|no connection"):
                await fleet.score(IDS, 3, 4)


async def test_a_refusal_is_final_on_the_first_replica_that_gives_it():
    said = b'{"error":{"message":"Requested prompt logprobs of 4, which is greater than max allowed: 2"}}'

    async def refuse(self, fault, request, reader, writer):
        writer.write(b"HTTP/1.1 400 X\r\ncontent-length: %d\r\n\r\n" % len(said) + said)
        await writer.drain()
        return True

    class Refusing(FaultyServer):
        _misbehave = refuse

    async with Refusing(lambda n, r: "x") as a, Refusing(lambda n, r: "x") as b:
        async with Fleet([a.url, b.url], model="t", config=QUICK) as fleet:
            with pytest.raises(KLimitError):
                await fleet.score(IDS, 3, 4)
        assert a.scored + b.scored == 1


async def test_replicas_that_agree_pass_and_a_hundredth_of_a_nat_is_caught():
    class Off(FaultyServer):
        async def _misbehave(self, fault, request, reader, writer):
            body = body_of(request, plus_a_hundredth)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            return True

    async with FaultyServer() as a, FaultyServer() as b, Off(lambda n, r: "x") as off:
        async with Fleet([a.url, b.url], model="t", config=QUICK) as fleet:
            assert await fleet.agreement(IDS, 3, 4) == 0.0
        async with Fleet([a.url, off.url], model="t", config=QUICK) as fleet:
            with pytest.raises(ResponseError, match=r"replicas disagree.*0.01 nats apart") as caught:
                await fleet.agreement(IDS, 3, 4)
            assert a.url in str(caught.value)
            assert off.url in str(caught.value)
            assert await fleet.agreement(IDS, 3, 4, tolerance_nats=0.02) == pytest.approx(0.01, abs=1e-4)


def test_a_fleet_of_nobody_or_of_twins_is_refused():
    with pytest.raises(ConfigError):
        Fleet([])
    with pytest.raises(ConfigError):
        Fleet(["http://h", "http://h"])
    with pytest.raises(ConfigError, match="one for each URL: got 1, expected 2"):
        Fleet(["http://a", "http://b"], make=[VllmCompletions])


@in_virtual_time
async def test_a_stopped_stream_finishes_what_is_under_way_and_takes_no_more():
    async with FaultyServer() as server:
        server.delay_s = 0.02
        async with Fleet([server.url], model="t", config=QUICK) as fleet:
            stream = Stream(fleet, jobs(1000), limit=4)
            seen = []
            async for done in stream:
                seen.append(done.key)
                if len(seen) == 6:
                    stream.stop()
            assert len(seen) == stream.taken == len(set(seen))
            assert stream.taken < 20
            await fleet.drain()
            with pytest.raises(ConfigError, match="closed"):
                await fleet.score(IDS, 3, 4)


@in_virtual_time
async def test_a_cancelled_stream_cancels_its_requests():
    async with FaultyServer() as server:
        server.delay_s = 30.0
        async with Fleet([server.url], model="t", config=QUICK.model_copy(update={"read_timeout_s": 60.0})) as fleet:

            async def consume() -> None:
                async for _ in Stream(fleet, jobs(6), limit=6):
                    raise AssertionError("nothing is ever answered")

            task = asyncio.create_task(consume())
            await until(lambda: server.scored == 6)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: server.dropped == 6)
            assert fleet.replicas[0].client.endpoint.gate.load == 0


@in_virtual_time
async def test_drain_waits_for_what_is_under_way():
    async with FaultyServer() as server:
        server.delay_s = 0.2
        async with Fleet([server.url], model="t", config=QUICK) as fleet:
            task = asyncio.create_task(fleet.score(IDS, 3, 4))
            await until(lambda: server.scored == 1)
            assert not task.done()
            await fleet.drain()
            assert task.done()
            assert (await task).rows == len(IDS) - 4


@in_virtual_time
async def test_a_probe_does_not_wait_behind_the_requests_that_are_stuck():
    config = ClientConfig(max_in_flight=1, window_start=1)
    async with FaultyServer() as server, VllmCompletions(server.url, model="t", config=config) as client:
        server.delay_s = 30.0
        stuck = [asyncio.create_task(client.score(IDS, 3, 4)) for _ in range(3)]
        await until(lambda: server.scored == 1)
        assert await client.healthy()
        server.healthy = False
        assert not await client.healthy()
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)


def test_a_fleet_closes_in_one_loop_while_a_probe_of_another_is_pending():
    config = QUICK.model_copy(update={"breaker_failures": 1, "max_retries": 100})
    fleet = Fleet(["http://127.0.0.1:1"], model="t", config=config)
    asked = threading.Event()

    async def hang() -> bool:
        asked.set()
        await asyncio.Event().wait()
        return True

    async def fail(*_: Any) -> Any:
        raise ServerUnreachableError("no connection")

    for replica in fleet.replicas:
        replica.client.healthy, replica.client.score = hang, fail  # type: ignore[method-assign]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        down = asyncio.run_coroutine_threadsafe(fleet.score(IDS, 3, 4), loop)
        assert asked.wait(30), "every circuit is open, and a probe is under way in the other loop"
        down.cancel()
        [probe] = fleet._probes
        asyncio.run(fleet.aclose())
        asyncio.run_coroutine_threadsafe(asyncio.wait([probe]), loop).result(30)
        assert probe.cancelled()
        assert not fleet._probes
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
