"""Every fault ends in the truth or in a typed error: bounded in time and memory, with nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import resource
import socket

import numpy as np
import pytest

from tests.fakes.virtual_time import in_virtual_time
from tests.faults.server import VOCAB, FaultyServer, actual_logp, assert_nothing_left, plus_a_hundredth, truth, until
from topkd.clients import ClientConfig, VllmCompletions
from topkd.topk.errors import (
    AlignmentError,
    ResponseError,
    ServerBusyError,
    ServerFailedError,
    ServerTimeoutError,
    ServerUnreachableError,
    TopkdError,
)

QUICK = ClientConfig(
    connect_timeout_s=1.0,
    read_timeout_s=0.4,
    read_timeout_per_token_s=0.0,
    total_timeout_s=6.0,
    max_retries=3,
    backoff_s=0.01,
    backoff_max_s=0.05,
)
IDS = [int(i) for i in np.random.default_rng(3).integers(0, VOCAB, 120)]
START, K = 20, 6

# fault -> (the error when it happens every time, whether a single occurrence is recovered from)
FAULTS: dict[str, tuple[type[TopkdError], bool]] = {
    "reset_before_header": (ServerUnreachableError, True),
    "reset_mid_header": (ServerUnreachableError, True),
    "reset_mid_body": (ServerUnreachableError, True),
    "no_http": (ServerUnreachableError, True),
    "endless_header": (ServerUnreachableError, True),
    "drip": (ServerTimeoutError, True),
    "stall": (ServerTimeoutError, True),
    "stall_mid_body": (ServerTimeoutError, True),
    "408": (ServerTimeoutError, True),
    "409": (ServerFailedError, True),
    "429": (ServerBusyError, True),
    "429_retry_after": (ServerBusyError, True),
    "429_tomorrow": (ServerBusyError, False),
    "500": (ServerFailedError, True),
    "503": (ServerBusyError, True),
    "nan_500": (ServerFailedError, True),
    "html_502": (ServerFailedError, True),
    "html_200": (ResponseError, True),
    "truncated_json": (ResponseError, True),
    "invalid_json": (ResponseError, True),
    "nan": (ResponseError, True),
    "null_logprob": (ResponseError, True),
    "duplicate_id": (ResponseError, True),
    "gzip_bomb": (ResponseError, True),
    "brotli": (ResponseError, True),
    "null_field": (ResponseError, True),
    "missing_field": (ResponseError, True),
    "no_choices": (ResponseError, True),
    "empty_200": (ResponseError, True),
    "endless_body": (ResponseError, True),
    "huge_announced": (ResponseError, True),
    "row_short": (AlignmentError, True),
    "row_long": (AlignmentError, True),
    "shifted": (AlignmentError, True),
    "wrong_ids": (AlignmentError, True),
    "null_row": (ResponseError, True),
    "k_minus_1": (ResponseError, True),
    "k_plus_1": (ResponseError, True),
    "mass_above_1": (ResponseError, True),
    "past_vocab": (ResponseError, True),
    "huge_int": (ResponseError, True),
}


@pytest.mark.parametrize("fault", FAULTS)
@in_virtual_time
async def test_a_fault_that_passes_is_recovered_from_and_one_that_stays_is_a_typed_error(fault: str):
    kind, recovers = FAULTS[fault]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with FaultyServer(lambda number, _: fault if number == 0 else None) as server:
        async with VllmCompletions(server.url, config=QUICK, vocab_size=VOCAB) as client:
            if recovers:
                topk = await client.score(IDS, START, K)
                assert np.array_equal(topk.actual_logp, actual_logp(IDS, START, K))
                assert topk.actual_ids.tolist() == IDS[START + 1 :]
                assert client.metrics["retries"] >= 1
            server.plan = lambda number, _: fault
            asked = server.scored
            async with asyncio.timeout(120):  # no fault is waited for without end
                with pytest.raises(kind) as caught:
                    await client.score(IDS, START, K)
            assert type(caught.value) is kind or kind is not ResponseError, caught.value
            assert server.scored - asked <= 1 + QUICK.max_retries, "no fault is asked about without end"
            text = str(caught.value)
            assert server.url in text, "the message names the endpoint"
            assert "\n" not in text
            server.plan = lambda number, _: None
            again = await client.score(IDS, START, K)
            assert np.array_equal(again.actual_logp, actual_logp(IDS, START, K)), "the client survives its errors"
            assert client.endpoint.gate.window.in_flight == 0
            assert client.endpoint.gate.budget.used == 0
        await assert_nothing_left(server)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    assert grown < 400_000, f"{fault}: {grown} KiB"


@in_virtual_time
async def test_a_refused_connection_is_unreachable_and_says_so():
    async with FaultyServer() as server:
        url = server.url
    async with VllmCompletions(url, config=QUICK, model="t") as client:
        with pytest.raises(ServerUnreachableError, match="no connection") as caught:
            await client.score(IDS, START, K)
    assert "4 tries" in str(caught.value)
    assert isinstance(caught.value, ConnectionError)


@in_virtual_time
async def test_a_kept_alive_connection_closed_under_us_costs_nothing():
    async with FaultyServer(lambda number, _: "closed_keepalive") as server:
        async with VllmCompletions(server.url, config=QUICK) as client:
            for _ in range(8):
                topk = await client.score(IDS, START, K)
                assert np.array_equal(topk.actual_logp, actual_logp(IDS, START, K))
        await assert_nothing_left(server)


async def test_a_hundredth_of_a_nat_in_one_reply_cannot_be_seen_and_is_listed_as_such():
    """Undetectable in one reply: replica agreement (test_fleet) and the alignment self-test are what catch it."""
    rows = truth(IDS, K)
    honest = rows[-2][IDS[-2]][0]
    plus_a_hundredth(IDS, rows)
    assert rows[-2][IDS[-2]][0] == pytest.approx(honest - 0.01)


@in_virtual_time
async def test_cancelling_a_request_closes_its_connection_at_the_server():
    async with FaultyServer() as server:
        server.delay_s = 30.0
        async with VllmCompletions(server.url, config=ClientConfig(), model="t") as client:
            task = asyncio.create_task(client.score(IDS, START, K))
            await until(lambda: server.scored == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: server.dropped == 1)  # the server sees the client hang up and can stop working
            assert client.endpoint.gate.window.in_flight == 0
        await assert_nothing_left(server)


@in_virtual_time
async def test_waiting_requests_can_be_cancelled_and_the_others_still_run():
    config = QUICK.model_copy(update={"max_in_flight": 1, "window_start": 1, "read_timeout_s": 5.0})
    async with FaultyServer() as server:
        server.delay_s = 0.3
        async with VllmCompletions(server.url, config=config, model="t") as client:
            tasks = [asyncio.create_task(client.score(IDS, START, K)) for _ in range(6)]
            await until(lambda: server.scored == 1)  # the first is under way, and holds the only place
            for task in tasks[1:4]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(r, asyncio.CancelledError) for r in results] == [False, True, True, True, False, False]
            assert server.scored == 3, "a cancelled request that still waited was never sent"
            assert client.endpoint.gate.budget.used == 0
        await assert_nothing_left(server)
        gc.collect()


@pytest.mark.parametrize("turns", range(5))
async def test_a_server_that_dies_while_it_accepts_leaves_no_socket(turns: int):
    async with FaultyServer() as server:
        with socket.create_connection(("127.0.0.1", server.port)):
            for _ in range(turns):
                await asyncio.sleep(0)
            await server.stop()
            assert server.open == 0
    gc.collect()  # an unclosed socket warns here, and a warning fails a test
