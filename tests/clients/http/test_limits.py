"""Admission: an adaptive window, a shared budget, first come first served, from any loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.fakes.turns import turns
from topkd.clients.config import ClientConfig
from topkd.clients.http.admission import AdaptiveWindow, Admission, MemoryBudget
from topkd.clients.http.metrics import Metrics
from topkd.topk.errors import ConfigError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def window(**options) -> tuple[AdaptiveWindow, Clock]:
    clock = Clock()
    return AdaptiveWindow(ClientConfig(**options), Metrics(), clock), clock


def test_the_window_doubles_each_round_until_the_first_overload_then_grows_by_one_per_32():
    w, _ = window(window_start=8, max_in_flight=64)
    for expected in (16, 32, 64, 64):
        for _ in range(w.size):
            w.in_flight = w.size - 1
            w.clean()
            if w.size == expected:
                break
        assert w.size == expected
    w.overload()
    assert w.size == 32
    for _ in range(31):
        w.in_flight = w.size
        w.clean()
    assert w.size == 32
    w.clean()
    assert w.size == 33


def test_one_overload_event_cuts_once_and_never_below_one():
    w, clock = window(window_start=8, window_cooldown_s=1.0)
    for _ in range(5):
        w.overload()
    assert w.size == 4
    for expected in (2, 1, 1):
        clock.now += 1.0
        w.overload()
        assert w.size == expected


def test_a_window_that_was_not_full_does_not_grow():
    w, _ = window(window_start=8)
    w.in_flight = 2
    for _ in range(100):
        w.clean()
    assert w.size == 8


async def test_after_a_cut_the_excess_drains_before_anything_new_goes():
    gate = Admission(ClientConfig(window_start=4, max_in_flight=4), Metrics())
    permits = [await gate.enter(1) for _ in range(4)]
    waiting = asyncio.create_task(gate.enter(1))
    await turns()
    permits[0].replied(overload=True)  # window 4 -> 2, three in flight: one of debt
    assert gate.window.debt == 1
    permits[1].replied(neutral=True)
    await turns()
    assert not waiting.done(), "two in flight fill the window of two"
    permits[2].replied(neutral=True)
    await turns()
    assert waiting.done()
    for permit in (*permits, waiting.result()):
        permit.release()
    assert (gate.window.in_flight, gate.budget.used) == (0, 0)


async def test_the_budget_is_held_until_decoded_and_shared_by_gates():
    budget = MemoryBudget(100)
    one, two = (Admission(ClientConfig(), Metrics(), budget) for _ in range(2))
    first = await one.enter(80)
    waiting = asyncio.create_task(two.enter(50))
    await turns()
    first.replied()
    await turns()
    assert not waiting.done(), "the reply's bytes are still there"
    first.release()
    await turns()
    assert waiting.done()
    waiting.result().release()
    assert budget.used == 0


async def test_a_request_larger_than_the_budget_goes_alone_instead_of_never():
    gate = Admission(ClientConfig(budget_token_k=10), Metrics())
    big = await gate.enter(1000)
    small = asyncio.create_task(gate.enter(1))
    await turns()
    assert not small.done()
    big.release()
    await turns()
    small.result().release()


async def test_small_requests_do_not_overtake_a_large_one():
    gate = Admission(ClientConfig(budget_token_k=100), Metrics())
    first = await gate.enter(60)
    order: list[str] = []

    async def go(name: str, cost: int) -> None:
        permit = await gate.enter(cost)
        order.append(name)
        permit.release()

    tasks = [asyncio.create_task(go("large", 90)), asyncio.create_task(go("small", 1))]
    await turns()
    assert order == []
    first.release()
    await asyncio.gather(*tasks)
    assert order == ["large", "small"]


async def test_a_full_queue_refuses_with_a_hint_instead_of_growing():
    gate = Admission(ClientConfig(window_start=1, max_queued=2), Metrics())
    held = await gate.enter(1)
    tasks = [asyncio.create_task(gate.enter(1)) for _ in range(2)]
    await turns()
    with pytest.raises(ConfigError, match=r"wait for admission.*max_queued = 2.*Semaphore"):
        await gate.enter(1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    held.release()
    assert gate.load == 0


async def test_a_waiter_cancelled_in_the_moment_it_is_admitted_gives_its_place_back():
    gate = Admission(ClientConfig(window_start=1, max_in_flight=1), Metrics())
    held = await gate.enter(1)
    first, second = (asyncio.create_task(gate.enter(1)) for _ in range(2))
    await turns()
    held.release()  # grants the first, whose future is not yet woken
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    (await second).release()
    assert (gate.window.in_flight, gate.budget.used) == (0, 0)


def test_one_gate_serves_several_loops_and_threads_at_once():
    gate = Admission(ClientConfig(window_start=2, max_in_flight=2), Metrics())
    inside, peak, lock = [0], [0], threading.Lock()

    async def work() -> None:
        for _ in range(25):
            permit = await gate.enter(1)
            with lock:
                inside[0] += 1
                peak[0] = max(peak[0], inside[0])
            await asyncio.sleep(0.0005)
            with lock:
                inside[0] -= 1
            permit.release()

    async def loop() -> None:
        await asyncio.gather(*(work() for _ in range(4)))

    threads = [threading.Thread(target=lambda: asyncio.run(loop())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
        assert not thread.is_alive(), "a waiter was lost"
    assert peak[0] == 2
    assert (gate.window.in_flight, gate.budget.used, gate.queued) == (0, 0, 0)
