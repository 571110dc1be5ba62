"""A soak: a tenth of the requests meet a fault, one replica of three dies, one is slow; nothing is lost or doubled."""

from __future__ import annotations

import random
import resource
import zlib
from collections import Counter

import numpy as np
import pytest

from tests.fakes.streaming import Job, Stream
from tests.fakes.virtual_time import in_virtual_time
from tests.faults.server import VOCAB, FaultyServer, assert_nothing_left
from topkd.clients import ClientConfig, Fleet

FAULTS = [
    "reset_before_header", "reset_mid_body", "closed_keepalive", "429_retry_after", "500", "503", "html_502",
    "html_200",
    "truncated_json", "nan", "null_field", "row_short", "shifted", "wrong_ids", "k_minus_1", "mass_above_1",
    "past_vocab",
]  # fmt: skip
START, K, LENGTH = 3, 3, 8
CONFIG = ClientConfig(
    connect_timeout_s=60.0,
    read_timeout_s=60.0,
    read_timeout_per_token_s=0.0,
    total_timeout_s=600.0,
    max_retries=8,
    response_retries=4,
    backoff_s=0.005,
    backoff_max_s=0.05,
    breaker_failures=8,
    breaker_cooldown_s=0.25,
    max_in_flight=32,
)


def prompt(number: int) -> list[int]:
    """A prompt that carries its own number, so that an answer to another question cannot pass."""
    return [number % 2000, number // 2000, *(zlib.crc32(b"%d/%d" % (number, i)) % VOCAB for i in range(LENGTH - 2))]


def expected(ids: list[int]) -> list[float]:
    return [-(1 + zlib.crc32(b"%d,%d" % (ids[i], ids[i - 1])) % 1000) / 256 - 2 for i in range(START + 1, len(ids))]


def truth_rows(ids: list[int], k: int) -> list:
    rows: list = [None]
    for i in range(1, len(ids)):
        actual = -(1 + zlib.crc32(b"%d,%d" % (ids[i], ids[i - 1])) % 1000) / 256 - 2
        others = [t % VOCAB for t in (ids[i] + 1, ids[i] + 2, ids[i] + 3)]
        rows.append({ids[i]: (actual, 9), others[0]: (-0.5, 1), others[1]: (-1.5, 2), others[2]: (-1.9, 3)})
    return rows


async def soak(requests: int, monkeypatch: pytest.MonkeyPatch, *, seed: int) -> dict[str, object]:
    monkeypatch.setattr("tests.faults.server.truth", truth_rows)
    rng = random.Random(seed)

    def plan(number: int, request: dict) -> str | None:
        return rng.choice(FAULTS) if rng.random() < 0.1 else None

    async with FaultyServer(plan) as steady, FaultyServer(plan) as slow, FaultyServer(plan) as dies:
        slow.delay_s = 0.02
        dead = False
        async with Fleet([s.url for s in (steady, slow, dies)], model="t", config=CONFIG, vocab_size=VOCAB) as fleet:
            stream = Stream(fleet, (Job(n, prompt(n), START, K) for n in range(requests)), limit=48)
            seen: Counter[int] = Counter()
            lost: Counter[str] = Counter()
            start_kib = 0
            async for done in stream:
                seen[done.key] += 1
                if done.error is not None:
                    lost[type(done.error).__name__] += 1
                else:
                    assert done.topk.actual_logp.tolist() == expected(prompt(done.key)), done.key
                    assert done.topk.actual_ids.tolist() == prompt(done.key)[START + 1 :]
                for server in (steady, slow, dies):  # what the fake remembers is not the client's memory
                    server.requests.clear()
                    server.headers.clear()
                if not dead and len(seen) > requests // 3:
                    dead = True
                    await dies.stop()
                if len(seen) == requests // 2:
                    start_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_kib
            metrics = fleet.metrics
            assert all(r.client.endpoint.gate.load == 0 for r in fleet.replicas)
            assert fleet.replicas[0].client.endpoint.gate.budget.used == 0
        await assert_nothing_left(steady, slow)
        faults = sum((s.faults for s in (steady, slow, dies)), Counter())
        return {
            "seen": seen,
            "lost": lost,
            "faults": sum(faults.values()),
            "kinds": len(faults),
            "scored": {"steady": steady.scored, "slow": slow.scored, "dies": dies.scored},
            "grown_kib": grown_kib,
            "metrics": {
                k: v for k, v in metrics.items() if k in {"tries", "retries", "failovers", "circuits_opened", "probes"}
            },
        }


def verify(result: dict, requests: int) -> None:
    seen = result["seen"]
    assert len(seen) == requests, "every sample is delivered or reported"
    assert set(seen.values()) == {1}, "and once"
    assert sum(result["lost"].values()) <= requests * 1e-3, result["lost"]
    assert result["faults"] > requests * 0.08
    assert result["scored"]["slow"] < result["scored"]["steady"]
    assert result["metrics"]["circuits_opened"] >= 1
    assert result["grown_kib"] < 50_000


@in_virtual_time
async def test_a_short_soak_delivers_every_sample_once(monkeypatch: pytest.MonkeyPatch):
    verify(await soak(700, monkeypatch, seed=1), 700)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@in_virtual_time
async def test_fifty_thousand_requests_with_a_dying_and_a_slow_replica(monkeypatch: pytest.MonkeyPatch):
    result = await soak(50_000, monkeypatch, seed=2)
    verify(result, 50_000)
    print(
        "soak:",
        {k: v for k, v in result.items() if k != "seen"},
        "delivered",
        int(np.sum(list(result["seen"].values()))),
    )
