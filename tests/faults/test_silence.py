"""Servers that fall silent: in the middle of a reply, or for good. Each is noticed long before a try's own time-out."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.fakes.virtual_time import in_virtual_time
from tests.faults.server import VOCAB, FaultyServer, actual_logp, assert_nothing_left, until
from tests.faults.test_faults import IDS, START, K
from topkd.clients import ClientConfig, Fleet, VllmCompletions
from topkd.topk.errors import ServerTimeoutError

PATIENT = ClientConfig(
    read_timeout_s=60.0,
    total_timeout_s=120.0,
    max_retries=1,
    backoff_s=0.01,
    backoff_max_s=0.05,
    stall_timeout_s=0.2,
    watchdog_s=0.2,
)


@in_virtual_time
async def test_a_reply_that_stops_in_the_middle_is_given_up_and_asked_for_again():
    async with FaultyServer(lambda number, _: "stall_mid_body" if number == 0 else None) as server:
        config = PATIENT.model_copy(update={"watchdog_s": 0.0})
        async with VllmCompletions(server.url, config=config, model="t", vocab_size=VOCAB) as client:
            async with asyncio.timeout(PATIENT.read_timeout_s):  # one such reply alone would take the try's minute
                topk = await client.score(IDS, START, K)
                assert np.array_equal(topk.actual_logp, actual_logp(IDS, START, K))
                server.plan = lambda number, _: "stall_mid_body"
                with pytest.raises(ServerTimeoutError, match=r"stopped in the middle.*then nothing for 0\.2 s"):
                    await client.score(IDS, START, K)
                await until(lambda: server.dropped == 3)  # each half reply's connection is closed
            assert server.scored == 4, "a half and a whole reply, then the two tries of the second request"
        await assert_nothing_left(server)


@in_virtual_time
async def test_a_server_without_a_sign_of_life_loses_its_requests_to_the_next_try():
    async with FaultyServer() as server:
        async with VllmCompletions(server.url, config=PATIENT, model="t", vocab_size=VOCAB) as client:
            server.frozen = True
            scores = [asyncio.create_task(client.score(IDS, START, K)) for _ in range(3)]
            await until(lambda: client.metrics.get("watchdog_cuts"))
            server.frozen = False
            answered = await asyncio.gather(*scores)
            for topk in answered:
                assert np.array_equal(topk.actual_logp, actual_logp(IDS, START, K))
            assert client.metrics["watchdog_cuts"] == 3, "every request under way there, not only the oldest"
            assert client.metrics["retries"] == 3
        await assert_nothing_left(server)


@in_virtual_time
async def test_a_server_that_stays_silent_ends_in_a_time_out_that_says_so():
    async with FaultyServer() as server:
        async with VllmCompletions(server.url, config=PATIENT, model="t") as client:
            server.frozen = True
            async with asyncio.timeout(PATIENT.read_timeout_s):
                with pytest.raises(ServerTimeoutError, match=r"no progress and .* no sign of life.*2 tries") as caught:
                    await client.score(IDS, START, K)
            assert server.url in str(caught.value)
            assert "watchdog_s" in str(caught.value)
            assert client.metrics["watchdog_cuts"] == 2, "no try ended by its own time-out"
            assert client.endpoint.gate.window.in_flight == 0
            assert client.endpoint.gate.budget.used == 0
        await assert_nothing_left(server)


@in_virtual_time
async def test_honest_work_that_takes_long_is_left_alone():
    async with FaultyServer() as server:
        server.delay_s = 1.0
        async with VllmCompletions(server.url, config=PATIENT, model="t") as client:
            topk = await client.score(IDS, START, K)
            assert np.array_equal(topk.actual_logp, actual_logp(IDS, START, K))
            assert client.metrics["watchdog_questions"] >= 2, "it was asked, and said that it lives"
            assert "watchdog_cuts" not in client.metrics
            assert client.metrics["tries"] == 1
        await assert_nothing_left(server)


@in_virtual_time
async def test_a_frozen_replica_hands_its_requests_to_the_others():
    async with FaultyServer() as good, FaultyServer() as frozen:
        async with Fleet([frozen.url, good.url], config=PATIENT, model="t", vocab_size=VOCAB) as fleet:
            frozen.frozen = True
            results = await asyncio.gather(*(fleet.score(IDS, START, K) for _ in range(8)))
            assert all(np.array_equal(topk.actual_logp, actual_logp(IDS, START, K)) for topk in results)
            assert fleet.metrics["failovers"] >= 1
        assert frozen.scored == 0
        await until(lambda: not good.open and not frozen.open)
        await assert_nothing_left(frozen)
