"""A hit never reaches the network; equal questions are asked once; what a miss returns is what a replay returns."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.fakes.turns import turns
from tests.offline.samples import checked, same, scored
from topkd.offline import CachingScorer, ReplayScorer, ScoreStore, TeacherIdentity
from topkd.topk.errors import CacheMissError, ServerBusyError
from topkd.topk.protocols import TeacherScorer

TEACHER = TeacherIdentity("teacher", revision="abc")


class LiveTeacher:
    """Scores by a fixed table of one wide list, after a wait that a test controls; counts what it is asked."""

    def __init__(self, seed: int = 1, k: int = 16) -> None:
        self.ids, self.wide = scored(seed, k=k, start=0)
        self.asked: list[tuple[int, int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures = 0
        self.cancelled = 0

    async def score(self, ids, start, k):
        assert np.array_equal(ids, self.ids)
        self.asked.append((start, k))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failures:
            self.failures -= 1
            raise ServerBusyError("the server asks for fewer requests")
        return self.wide.slice(slice(start, None), k=min(k, self.wide.k))


@pytest.fixture
def store(tmp_path):
    with ScoreStore(tmp_path / "cache", mode="a") as store:
        yield store


async def test_the_second_request_is_a_hit_and_so_are_narrower_and_later_ones(store):
    live = LiveTeacher()
    scorer: TeacherScorer = CachingScorer(live, store, TEACHER)
    first = await scorer.score(live.ids, 5, 8)
    assert same(await scorer.score(live.ids.tolist(), 5, 8), first)
    assert same(await scorer.score(live.ids, 9, 3), checked(first.slice(slice(4, None), k=3)))
    assert live.asked == [(5, 8)]
    assert scorer.metrics.as_dict() == {"hits": 2, "misses": 1, "joined": 0, "saved_tokens": 80, "asked_tokens": 40}


async def test_a_wider_k_or_an_earlier_start_is_asked_and_supersedes(store):
    live = LiveTeacher()
    scorer = CachingScorer(live, store, TEACHER)
    for start, k in ((5, 4), (5, 8), (2, 8), (2, 4), (30, 1)):
        assert (await scorer.score(live.ids, start, k)).k == k
    assert live.asked == [(5, 4), (5, 8), (2, 8)]
    assert store.stats().live == 1


async def test_concurrent_misses_for_one_key_become_one_request(store):
    live = LiveTeacher()
    live.gate.clear()
    scorer = CachingScorer(live, store, TEACHER)
    requests = [(3, 8)] * 10 + [(3, 2), (20, 8), (7, 5)]
    waiting = [asyncio.create_task(scorer.score(live.ids, start, k)) for start, k in requests]
    await turns()
    live.gate.set()
    answers = await asyncio.gather(*waiting)
    assert live.asked == [(3, 8)]
    assert all((answer.start, answer.k) == request for answer, request in zip(answers, requests, strict=True))
    assert all(same(answer, answers[0]) for answer in answers[:10])
    assert (scorer.metrics.misses, scorer.metrics.joined) == (1, 12)
    assert store.stats().records == 1


async def test_a_wider_request_does_not_join_a_narrower_one(store):
    live = LiveTeacher()
    live.gate.clear()
    scorer = CachingScorer(live, store, TEACHER)
    waiting = [asyncio.create_task(scorer.score(live.ids, 3, k)) for k in (4, 8)]
    await turns()
    live.gate.set()
    assert [answer.k for answer in await asyncio.gather(*waiting)] == [4, 8]
    assert live.asked == [(3, 4), (3, 8)]


async def test_a_failure_reaches_all_who_wait_and_is_not_remembered(store):
    live = LiveTeacher()
    live.gate.clear()
    live.failures = 1
    scorer = CachingScorer(live, store, TEACHER)
    waiting = [asyncio.create_task(scorer.score(live.ids, 3, 4)) for _ in range(3)]
    await turns()
    live.gate.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in answers] == [ServerBusyError] * 3
    assert len(store) == 0
    assert (await scorer.score(live.ids, 3, 4)).k == 4
    assert live.asked == [(3, 4), (3, 4)]


async def test_one_caller_that_gives_up_does_not_stop_the_others(store):
    live = LiveTeacher()
    live.gate.clear()
    scorer = CachingScorer(live, store, TEACHER)
    first = asyncio.create_task(scorer.score(live.ids, 3, 4))
    second = asyncio.create_task(scorer.score(live.ids, 3, 4))
    await turns()
    first.cancel()
    await turns()
    live.gate.set()
    assert (await second).k == 4
    assert first.cancelled()
    assert live.asked == [(3, 4)]
    assert live.cancelled == 0


async def test_the_request_is_dropped_with_its_last_caller(store):
    live = LiveTeacher()
    live.gate.clear()
    scorer = CachingScorer(live, store, TEACHER)
    waiting = [asyncio.create_task(scorer.score(live.ids, 3, 4)) for _ in range(2)]
    await turns()
    for task in waiting:
        task.cancel()
    await turns()
    assert live.cancelled == 1
    live.gate.set()
    assert (await scorer.score(live.ids, 3, 4)).k == 4


@pytest.mark.parametrize("codec", ["raw", "packed", "cold"])
async def test_a_replay_gives_bit_for_bit_what_the_live_run_gave(tmp_path, codec):
    live = LiveTeacher(k=20)
    with ScoreStore(tmp_path, mode="a", codec=codec) as store:
        answers = [await CachingScorer(live, store, TEACHER).score(live.ids, start, 20) for start in (9, 4)]
    with ScoreStore(tmp_path) as store:
        replay: TeacherScorer = ReplayScorer(store, TEACHER)
        again = [await replay.score(live.ids, start, 20) for start in (4,)]
    assert same(again[0], answers[1])


async def test_what_another_process_wrote_is_found_before_asking(tmp_path):
    live = LiveTeacher()
    store, other = ScoreStore(tmp_path, mode="a"), ScoreStore(tmp_path, mode="a")
    scorer = CachingScorer(live, store, TEACHER, refresh_s=0.0)
    other.put(TEACHER, live.ids, live.wide)
    assert (await scorer.score(live.ids, 5, 8)).k == 8
    assert live.asked == []
    store.close()
    other.close()


async def test_a_replay_miss_says_what_is_asked_what_is_there_and_what_to_do(store):
    ids, scores = scored(3, k=8)
    replay = ReplayScorer(store, TEACHER)
    with pytest.raises(CacheMissError, match="no record of these ids") as nothing:
        await replay.score(ids, 5, 8)
    assert "teacher" in str(nothing.value)
    assert "\n" not in str(nothing.value)
    store.put(TEACHER, ids, scores)
    with pytest.raises(CacheMissError, match=r"got K 8 from position 5, expected K 20 from position 5"):
        await replay.score(ids, 5, 20)
    with pytest.raises(CacheMissError, match="expected K 8 from position 2"):
        await replay.score(ids, 2, 8)
    assert isinstance(nothing.value, LookupError)
    assert replay.metrics.misses == 3
