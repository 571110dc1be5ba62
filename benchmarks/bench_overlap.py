"""How busy the slowest stage of a run is: sampling, scoring, learning and syncing slowed on purpose (F5).

The engine's own loop (``topkd.engine.loop.loop.distil``) over stages that sleep: a sampler with weights of its own, a
teacher, a learner, a sync. A stage is busy while at least one of its calls is under way; its share is that time over
the run's wall time, the pipeline's filling and draining included. Each mix runs one after the other (staleness 0) and
pipelined (staleness 3) in one process, in turns; the median of the rounds counts.

    python benchmarks/bench_overlap.py [--steps 40] [--rounds 3] [--unit 0.1]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from topkd.engine.config.engine_config import CheckpointConfig, EngineConfig, RolloutConfig
from topkd.engine.loop.hooks import Hooks
from topkd.engine.loop.loop import LoopParts, distil
from topkd.engine.loop.metrics import MetricsLog
from topkd.engine.loop.prompts import PromptRow
from topkd.topk import Rollout, TopK

STAGES = ("sample", "score", "learn", "sync")
# Seconds of each stage in units of the slowest.
MIXES = {
    "sampling": (1.0, 0.5, 0.5, 0.2),
    "scoring": (0.5, 1.0, 0.5, 0.2),
    "learning": (0.5, 0.5, 1.0, 0.2),
    "syncing": (0.5, 0.5, 0.5, 1.0),
    "two alike": (0.5, 1.0, 1.0, 0.2),
    "all alike": (1.0, 1.0, 1.0, 1.0),
}
STALENESS, TARGET = 3, 0.9
PROMPTS, TOKENS = 4, 8


class Clock:
    """When each stage was busy: the union of its calls."""

    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self.busy = dict.fromkeys(STAGES, 0.0)
        self._under_way = dict.fromkeys(STAGES, 0)
        self._since = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def on(self, stage: str) -> Iterator[None]:
        with self._lock:
            if not self._under_way[stage]:
                self._since[stage] = time.perf_counter()
            self._under_way[stage] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[stage] -= 1
                if not self._under_way[stage]:
                    self.busy[stage] += time.perf_counter() - self._since[stage]


class Stages:
    """Everything ``distil`` is given, each part asleep for as long as the mix says."""

    objective = EngineConfig().objective

    def __init__(self, seconds: dict[str, float], clock: Clock) -> None:
        self.seconds, self.clock = seconds, clock
        self.version, self.published, self.captured = 0, -1, -1
        self.stale: list[int] = []

    async def sample_batch(self, prompts, n, params, *, k=0):
        version = self.published  # taken before the first wait: a sync may come meanwhile
        with self.clock.on("sample"):
            await asyncio.sleep(self.seconds["sample"])
        ids, logp = np.arange(TOKENS, dtype=np.int32), np.full(TOKENS, -2.0, dtype=np.float32)
        return [[Rollout(prompt, ids, logp, "stop", params, version=str(version))] * n for prompt in prompts]

    async def sample(self, prompt, n, params, *, k=0):
        return (await self.sample_batch([prompt], n, params, k=k))[0]

    async def score(self, ids, start, k):
        with self.clock.on("score"):
            await asyncio.sleep(self.seconds["score"])
        rows = ids.size - 1 - start
        actual = np.asarray(ids[start + 1 :], dtype=np.int32)
        logp = np.full(rows, -1.0, dtype=np.float32)
        return TopK(start, actual[:, None], logp[:, None], actual, logp, np.full(rows, -0.5, dtype=np.float32))

    def step(self, samples, *more):
        with self.clock.on("learn"):
            self.clock.sleep(self.seconds["learn"])
        self.version += 1
        return {"tokens": TOKENS * len(samples)}

    def capture(self, version: int) -> None:
        self.captured = version

    async def publish(self, version: int) -> None:
        assert self.captured >= version
        with self.clock.on("sync"):
            await asyncio.sleep(self.seconds["sync"])
        self.published = version


async def run(stages: Stages, steps: int, staleness: int) -> None:
    """The engine's loop over these stages; its schedule is checked."""
    config = EngineConfig(
        steps=steps, max_staleness=staleness, checkpoint=CheckpointConfig(every=0),
        rollout=RolloutConfig(prompts_per_step=PROMPTS, samples_per_prompt=1, max_completion_tokens=TOKENS),
    )  # fmt: skip
    hooks = Hooks(publish=stages.publish, capture=stages.capture, publish_while_sampling=True)
    with tempfile.TemporaryDirectory() as folder, MetricsLog(Path(folder) / "metrics.jsonl") as log:
        records = await distil(
            LoopParts(config, [PromptRow([1, 2, i], [1, 2, i]) for i in range(8)], stages, {"": stages}),
            stages,
            log,
            hooks=hooks,
        )
    expected = [min(step, staleness) for step in range(steps)]
    assert [record["staleness"] for record in records] == expected, "the schedule was not kept"
    assert [record["rollout_versions"] for record in records] == [[str(s - d)] for s, d in enumerate(expected)]


def one_run(mix: tuple[float, ...], unit: float, steps: int, staleness: int) -> dict[str, float]:
    """Wall seconds of a run, and each stage's share of them."""
    stages = Stages({name: part * unit for name, part in zip(STAGES, mix, strict=True)}, Clock())
    began = time.perf_counter()
    asyncio.run(run(stages, steps, staleness))
    wall = time.perf_counter() - began
    return {"wall_s": wall, **{name: busy / wall for name, busy in stages.clock.busy.items()}}


def measure(name: str, unit: float, steps: int, rounds: int) -> dict[str, object]:
    mix = MIXES[name]
    slowest = [stage for stage, part in zip(STAGES, mix, strict=True) if part == max(mix)]
    runs: dict[int, list[dict[str, float]]] = {0: [], STALENESS: []}
    for _ in range(rounds):
        for staleness, found in runs.items():
            found.append(one_run(mix, unit, steps, staleness))

    def median(staleness: int, key: str) -> float:
        return statistics.median(run[key] for run in runs[staleness])

    return {
        "mix": name,
        "units": dict(zip(STAGES, mix, strict=True)),
        "slowest": slowest,
        "busy_sequential": max(median(0, stage) for stage in slowest),
        "busy": max(median(STALENESS, stage) for stage in slowest),
        "busy_all": {stage: median(STALENESS, stage) for stage in STAGES},
        "wall_sequential_s": median(0, "wall_s"),
        "wall_s": median(STALENESS, "wall_s"),
        "times_faster": median(0, "wall_s") / median(STALENESS, "wall_s"),
    }


def machine() -> dict[str, str]:
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.now(tz=UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unit", type=float, default=0.1, help="seconds of the slowest stage")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overlap.json")
    args = parser.parse_args()
    where = machine()
    print(
        f"share of wall time in which the slowest stage is busy; {args.steps} steps of {1000 * args.unit:.0f} ms, "
        f"staleness {STALENESS} against the sequential loop, {where['cpu']}"
    )
    print(f"{'slowest':>12} {'sequential':>11} {'pipelined':>10} {'faster':>8}   sample score learn sync")
    rows = []
    for name in MIXES:
        row = measure(name, args.unit, args.steps, args.rounds)
        rows.append(row)
        shares = " ".join(f"{share:5.2f}" for share in row["busy_all"].values())
        below = "" if row["busy"] >= TARGET else f"   below the target of {TARGET}"
        print(
            f"{name:>12} {row['busy_sequential']:>11.2f} {row['busy']:>10.2f} {row['times_faster']:>7.2f}x   "
            f"{shares}{below}"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": where, "steps": args.steps, "unit_s": args.unit, "staleness": STALENESS, "rows": rows}
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
