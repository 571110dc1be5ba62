"""Hedges: only scores, only the slowest, only as many as the budget has, and the loser is cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.clients.fleet.test_fleet import IDS, QUICK, prompts
from tests.fakes.virtual_time import in_virtual_time
from tests.faults.server import FaultyServer, actual_logp, body_of, until
from topkd.clients import ClientConfig, Fleet
from topkd.clients.fleet.routing import Hedging
from topkd.topk.errors import KLimitError

HEDGED = QUICK.model_copy(update={"read_timeout_s": 60.0, "hedge_share": 0.05, "total_timeout_s": 120.0})


class Once:
    """A plan that does one thing to the next request of any server it is given to."""

    def __init__(self, fault: str) -> None:
        self.fault, self.left = fault, 0

    def __call__(self, number: int, request: dict[str, Any]) -> str | None:
        if not self.left:
            return None
        self.left -= 1
        return self.fault


def known_fast(fleet: Fleet, seconds: float = 0.001) -> None:
    """As after a hundred scores of so many seconds: a slower one may be hedged, and five hedges are saved up."""
    for _ in range(100):
        fleet._hedging.answered(seconds, 12)


def test_patience_is_the_95th_percentile_per_token_once_enough_is_known():
    hedging = Hedging(0.05)
    for seconds in np.linspace(0.1, 1.0, 64)[:-1]:
        hedging.answered(float(seconds), 936)
    assert hedging.patience_s(936) is None
    hedging.answered(1.0, 936)
    assert hedging.patience_s(936) == pytest.approx(np.percentile(np.linspace(0.1, 1.0, 64), 95))
    assert hedging.patience_s(1936) == pytest.approx(2 * hedging.patience_s(936)), "a long prompt is slow everywhere"


def test_the_budget_is_a_share_of_the_scores_and_little_of_it_is_saved_up():
    hedging = Hedging(0.05)
    for _ in range(19):
        hedging.answered(0.1, 10)
    assert not hedging.spend()
    hedging.answered(0.1, 10)
    assert hedging.spend()
    assert not hedging.spend()
    for _ in range(10_000):
        hedging.answered(0.1, 10)
    assert sum(hedging.spend() for _ in range(500)) == 8


def test_hedging_is_off_unless_asked_for_and_never_above_one_in_twenty():
    off = Hedging(ClientConfig().hedge_share)
    for _ in range(200):
        off.answered(0.1, 10)
    assert off.patience_s(10) is None
    with pytest.raises(ValidationError):
        ClientConfig(hedge_share=0.2)


@in_virtual_time
async def test_a_slow_score_is_answered_by_another_replica_and_the_slow_one_is_cancelled():
    stall = Once("stall")
    servers = FaultyServer(stall), FaultyServer(stall)
    async with servers[0] as a, servers[1] as b, Fleet([a.url, b.url], model="t", config=HEDGED) as fleet:
        known_fast(fleet, 0.3)
        stall.left = 1
        topk = await fleet.score(IDS, 3, 4)
        assert np.array_equal(topk.actual_logp, actual_logp(IDS, 3, 4))
        assert (fleet.metrics["hedges"], fleet.metrics["hedges_won"]) == (1, 1)
        await until(lambda: a.dropped + b.dropped == 1)  # the server that was too slow sees its client leave
        assert fleet.replicas[0].client.endpoint.gate.load == fleet.replicas[1].client.endpoint.gate.load == 0
        assert fleet.metrics.get("retries", 0.0) == 0.0, "a hedge is part of its try, not another one"


@in_virtual_time
async def test_when_everything_is_slow_hedges_stay_within_their_share():
    async with FaultyServer() as a, FaultyServer() as b:
        async with Fleet([a.url, b.url], model="t", config=HEDGED) as fleet:
            known_fast(fleet)
            a.delay_s = b.delay_s = 0.03
            for ids in prompts(60):
                await fleet.score(ids, 3, 4)
            assert 1 <= fleet.metrics["hedges"] <= 0.05 * 160
        # A hedge that loses at once may be cancelled before it was sent.
        assert 60 <= a.scored + b.scored <= 60 + fleet.metrics["hedges"]


@in_virtual_time
async def test_a_hedge_that_fails_leaves_the_first_try_to_answer():
    class SlowThenBroken(FaultyServer):
        async def _misbehave(self, fault, request, reader, writer):
            if fault != "slow":
                return await super()._misbehave(fault, request, reader, writer)
            await asyncio.sleep(1.5)
            body = body_of(request)
            writer.write(b"HTTP/1.1 200 X\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            return True

    asked: list[str] = []

    def plan(number: int, request: dict[str, Any]) -> str:
        asked.append("500" if asked else "slow")
        return asked[-1]

    servers = SlowThenBroken(plan), SlowThenBroken(plan)
    async with servers[0] as a, servers[1] as b, Fleet([a.url, b.url], model="t", config=HEDGED) as fleet:
        known_fast(fleet, 0.3)
        topk = await fleet.score(IDS, 3, 4)
        assert np.array_equal(topk.actual_logp, actual_logp(IDS, 3, 4))
        assert asked == ["slow", "500"], "the hedge failed first, and was not tried again"
        assert fleet.metrics["hedges"] == 1
        assert fleet.metrics["hedges_won"] == 0


@in_virtual_time
async def test_a_refusal_is_not_asked_for_twice():
    said = b'{"error":{"message":"Requested prompt logprobs of 4, which is greater than max allowed: 2"}}'

    class Refusing(FaultyServer):
        async def _misbehave(self, fault, request, reader, writer):
            await asyncio.sleep(0.2)
            writer.write(b"HTTP/1.1 400 X\r\ncontent-length: %d\r\n\r\n" % len(said) + said)
            await writer.drain()
            return True

    plan = Once("refuse")
    async with Refusing(plan) as a, Refusing(plan) as b, Fleet([a.url, b.url], model="t", config=HEDGED) as fleet:
        known_fast(fleet)
        plan.left = 2
        with pytest.raises(KLimitError):
            await fleet.score(IDS, 3, 4)
        assert fleet.metrics.get("retries", 0.0) == 0.0
