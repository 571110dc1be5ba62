"""Stages work beside each other: in virtual time the slowest stage is never idle once the pipeline is full."""

import asyncio
import importlib.util
import itertools
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.virtual_time import VirtualLoop

BENCH = Path(__file__).parents[3] / "benchmarks" / "bench_overlap.py"
STEPS = 14
SLOWEST = {"sampling": "sample", "scoring": "score", "learning": "learn", "syncing": "sync"}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_overlap", BENCH)
    module = sys.modules["bench_overlap"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_overlap"]


class Timeline:
    """When each stage's calls began and ended, in virtual seconds."""

    def __init__(self, loop):
        self.loop, self.sleep = loop, loop.sleep_in_thread
        self.calls = {}

    @contextmanager
    def on(self, stage):
        began = self.loop.time()
        yield
        self.calls.setdefault(stage, set()).add((round(began, 6), round(self.loop.time(), 6)))


def calls(bench, mix, staleness):
    """Each stage's intervals of a run , those of a batch's scores taken as one."""
    loop = VirtualLoop()
    timeline = Timeline(loop)
    stages = bench.Stages(dict(zip(bench.STAGES, bench.MIXES[mix], strict=True)), timeline)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(bench.run(stages, STEPS, staleness))
    return {stage: sorted(found) for stage, found in timeline.calls.items()}


@pytest.mark.parametrize("mix", SLOWEST)
def test_without_staleness_one_stage_works_at_a_time(bench, mix):
    found = sorted(interval for intervals in calls(bench, mix, staleness=0).values() for interval in intervals)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(found))
    assert found[-1][1] == pytest.approx(STEPS * sum(bench.MIXES[mix]) + bench.MIXES[mix][-1])


@pytest.mark.parametrize(("mix", "slowest"), SLOWEST.items())
def test_with_staleness_the_slowest_stage_is_never_idle_once_the_pipeline_is_full(bench, mix, slowest):
    found = calls(bench, mix, staleness=3)
    busy = found[slowest][1:] if slowest == "sync" else found[slowest]  # the first sync is before the first step
    assert len(busy) == STEPS
    assert all(begin <= end for (_, end), (begin, _) in itertools.pairwise(busy)), busy
    filling_and_draining = sum(bench.MIXES[mix]) + bench.MIXES[mix][-1]
    assert max(end for _, end in found["sync"]) <= STEPS + filling_and_draining
    for other in set(bench.STAGES) - {slowest}:
        began = [begin for begin, _ in found[other][4:-4]]
        assert all(any(a <= begin < b for a, b in busy) for begin in began), other
