"""Stages work beside each other: a run takes about as long as its slowest stage, not as all of them together."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_overlap.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_overlap", BENCH)
    module = sys.modules["bench_overlap"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_overlap"]


@pytest.mark.parametrize("slowest", ["sampling", "scoring", "learning", "syncing"])
def test_a_run_is_about_as_slow_as_its_slowest_stage(bench, slowest):
    mix = bench.MIXES[slowest]
    sequential, pipelined = (bench.one_run(mix, 0.06, 14, staleness) for staleness in (0, 3))
    stage = bench.STAGES[["sampling", "scoring", "learning", "syncing"].index(slowest)]
    # Here 14 steps fill and drain the pipeline; benchmarks/bench_overlap.py has 60 and reaches 0.95.
    assert pipelined[stage] > 0.7
    together = [sum(run[stage] for stage in bench.STAGES) for run in (sequential, pipelined)]
    assert together[0] < 1.02, "one stage at a time"
    assert together[1] > 1.3, "several"
    assert sequential[stage] < 0.55
