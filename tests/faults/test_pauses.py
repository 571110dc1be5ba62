"""A server that is paused for another job's weights costs no row: it is waited for, on a budget of its own."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.fakes.virtual_time import in_virtual_time
from tests.faults.server import VOCAB, FaultyServer, actual_logp, assert_nothing_left, until
from tests.faults.test_faults import IDS, START, K
from topkd.clients import ClientConfig, Fleet, VllmCompletions
from topkd.clients.http.endpoint import Endpoint, RequestInfo
from topkd.topk.errors import ServerBusyError, ServerPausedError, ServerTimeoutError
from topkd.topk.types import TopK

# One retry: every pause below would lose its rows if it cost a try.
PATIENT = ClientConfig(max_retries=1, backoff_s=0.01, backoff_max_s=0.02, pause_timeout_s=60.0, watchdog_s=0.0)


@pytest.fixture(autouse=True)
def _even_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who wait ask together: the virtual clock moves once for all of them."""
    monkeypatch.setattr("topkd.clients.http.retry.random.uniform", lambda low, high: high)


def client(server: FaultyServer, **changes: float) -> VllmCompletions:
    return VllmCompletions(server.url, config=PATIENT.model_copy(update=changes), model="t", vocab_size=VOCAB)


def assert_right(topk: TopK) -> None:
    assert np.array_equal(topk.actual_logp, actual_logp(IDS, START, K))


@pytest.mark.parametrize("seconds", [0.1, 20.0], ids=["short", "long"])
@pytest.mark.parametrize("has_is_paused", [True, False], ids=["tells", "does-not-tell"])
@in_virtual_time
async def test_no_row_is_lost_in_a_pause_and_no_try_is_spent(seconds: float, has_is_paused: bool):
    async with FaultyServer() as server:
        server.has_is_paused = has_is_paused
        async with client(server) as up:
            server.pause_for(seconds)
            for topk in await asyncio.gather(*(up.score(IDS, START, K) for _ in range(8))):
                assert_right(topk)
            assert server.scored == 8
            assert "retries" not in up.metrics
            assert "window_cuts" not in up.metrics, "a pause is no overload"
            if has_is_paused:
                assert server.rejected == 8, "one asks for all; nobody sends a prompt that will be rejected"
                assert server.asked_pause <= seconds / 0.5 + 2
            else:
                assert server.rejected <= 8 * 12
        await assert_nothing_left(server)


@in_virtual_time
async def test_a_pause_beyond_the_budget_ends_in_an_error_that_says_what_to_do():
    async with FaultyServer() as server:
        async with client(server, pause_timeout_s=3.0, max_retries=5) as up:
            server.pause = "reject"
            with pytest.raises(ServerPausedError) as caught:
                await up.score(IDS, START, K)
            for words in (server.url, "Generation is paused", "after 3 s of waiting", "pause_timeout_s = 3", "/resume"):
                assert words in str(caught.value)
            assert "retries" not in up.metrics, "who waited in vain is not sent round again"
            assert up.metrics["failed_ServerPausedError"] == 1
            assert up.endpoint.gate.window.in_flight == up.endpoint.gate.budget.used == 0
            server.resume()
            assert_right(await up.score(IDS, START, K))
        await assert_nothing_left(server)


@in_virtual_time
async def test_without_a_budget_the_first_rejection_is_the_error():
    async with FaultyServer() as server:
        async with client(server, pause_timeout_s=0.0) as up:
            server.pause = "reject"
            with pytest.raises(ServerPausedError, match="Generation is paused"):
                await up.score(IDS, START, K)
            assert server.rejected == 1
        await assert_nothing_left(server)


@in_virtual_time
async def test_pauses_leave_the_tries_and_the_total_time_to_real_failures():
    faults = ["503", None]
    async with FaultyServer(lambda number, _: faults[number]) as server:
        async with client(server, total_timeout_s=5.0) as up:
            server.pause_for(30.0)
            assert_right(await up.score(IDS, START, K))
            assert up.metrics["retries"] == 1, "it was busy once when it was resumed: the one retry that there is"
            faults.extend(["503", "503"])
            server.pause_for(30.0)
            with pytest.raises(ServerBusyError, match="gave up after 2 tries"):
                await up.score(IDS, START, K)
        await assert_nothing_left(server)


@in_virtual_time
async def test_the_callers_deadline_and_a_cancellation_end_the_wait():
    async with FaultyServer() as server:
        async with client(server) as up:
            server.pause = "reject"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(4.0):
                    await up.score(IDS, START, K)
            waiting = asyncio.create_task(up.score(IDS, START, K))
            await until(lambda: server.rejected == 2)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert up.endpoint.gate.window.in_flight == up.endpoint.gate.budget.used == 0
            server.resume()
            assert_right(await up.score(IDS, START, K))
        await assert_nothing_left(server)


@in_virtual_time
async def test_a_server_that_holds_what_it_gets_is_waited_for_too():
    """vLLM before 0.33, and mode=keep: nothing comes back, and /is_paused says why."""
    async with FaultyServer() as server:
        async with client(server, read_timeout_s=1.0, read_timeout_per_token_s=0.0) as up:
            server.pause_for(20.0, "hold")
            assert_right(await up.score(IDS, START, K))
            assert "retries" not in up.metrics
            server.has_is_paused, server.pause = False, "hold"
            with pytest.raises(TimeoutError, match="2 tries"):
                await up.score(IDS, START, K)
        await assert_nothing_left(server)


@in_virtual_time
async def test_a_score_that_the_pause_aborted_is_asked_for_again():
    async with FaultyServer(lambda number, _: "aborted" if number < 3 else None) as server:
        async with client(server) as up:
            assert_right(await up.score(IDS, START, K))
            assert "retries" not in up.metrics
        await assert_nothing_left(server)


@in_virtual_time
async def test_what_may_be_sent_once_only_is_sent_again_after_a_rejection():
    """Nothing of it was run."""
    async with FaultyServer() as server:
        async with client(server) as up:
            server.pause_for(5.0)
            body = {"prompt": IDS, "prompt_logprobs": K, "max_tokens": 1}
            once = RequestInfo(single_try=True)
            reply = await up.endpoint.call("POST", "/v1/completions", body, decode=len, asks=once)
            assert reply > 1000
            assert server.scored == 1
        await assert_nothing_left(server)


@in_virtual_time
async def test_what_may_be_sent_once_only_and_is_held_ends_at_its_time_out():
    """The pause may be the sender's own, and its request may be running: it is neither waited for nor sent again."""
    async with FaultyServer() as server:
        async with client(server, read_timeout_s=2.0, read_timeout_per_token_s=0.0) as up:
            server.pause = "hold"
            body = {"prompt": IDS, "prompt_logprobs": K, "max_tokens": 1}
            with pytest.raises(ServerTimeoutError) as caught:
                await up.endpoint.call("POST", "/v1/completions", body, decode=len, asks=RequestInfo(single_try=True))
            assert not isinstance(caught.value, ServerPausedError)
            assert "pauses" not in up.metrics
            server.resume()
        await assert_nothing_left(server)


@in_virtual_time
async def test_a_question_about_a_pause_that_was_abandoned_keeps_nobody_waiting():
    """The event loop that asked was stopped while it waited for the answer."""
    async with FaultyServer() as server:
        async with client(server) as up:
            up.endpoint._pause_asked_until = asyncio.get_running_loop().time() + 6.0
            server.pause = "reject"
            assert await up.endpoint.is_paused()
            server.resume()
        await assert_nothing_left(server)


@in_virtual_time
async def test_a_fleet_goes_to_the_replica_that_is_not_paused_and_counts_no_failure():
    async with FaultyServer() as first, FaultyServer() as second:
        async with Fleet([first.url, second.url], config=PATIENT, model="t", vocab_size=VOCAB) as fleet:
            first.pause = "reject"
            for _ in range(8):
                assert_right(await fleet.score(IDS, START, K))
            assert first.rejected > 0
            assert second.scored == 8
            assert "pauses" not in fleet.metrics, "nobody waited"
            second.pause_for(20.0)
            for topk in await asyncio.gather(*(fleet.score(IDS, START, K) for _ in range(6))):
                assert_right(topk)
            assert "circuits_opened" not in fleet.metrics
            assert "retries" not in fleet.metrics
            assert fleet.metrics["replica_0_closed"] == 1
            first.resume()
            first.pause_for(5.0)
            assert await fleet.agreement(IDS, START, 1) == 0.0, "a comparison waits for the replica that it compares"
            first.pause = second.pause = "reject"
            fleet.config = PATIENT.model_copy(update={"pause_timeout_s": 2.0})
            with pytest.raises(ServerPausedError, match="pause_timeout_s = 2"):
                await fleet.score(IDS, START, K)
        await assert_nothing_left(first, second)


async def test_an_endpoint_knows_a_server_without_the_route():
    async with FaultyServer() as server:
        server.has_is_paused = False
        endpoint = Endpoint(server.url)
        assert await endpoint.is_paused() is False
        server.has_is_paused, server.pause = True, "reject"
        assert await endpoint.is_paused() is False, "it is not asked again"
        assert server.asked_pause == 0
        await endpoint.aclose()
