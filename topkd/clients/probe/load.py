"""Scoring under rising concurrency until the server saturates, and what that means for a training run."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from topkd.clients.probe.findings import Capabilities, Load, LoadLevel
from topkd.clients.probe.scores import build_long_prompt
from topkd.clients.probe.session import Session
from topkd.topk.errors import ConfigError, TopkdError

EMBEDDED = "+topkd"  # in the version of `topkd serve`
_LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_GAIN = 1.08  # a doubling that gains less has found the limit
_ENOUGH_S = 1.0  # a level lasts at least this long: fewer requests than that say little
_MOST = 64  # rounds of requests a level, at most
_LEVEL_S = 20.0  # a level is not started when it would take longer
_BUDGET_S = 120.0


async def measure_load(session: Session, *, tokens: int, batch: int) -> Load:
    """Measure tokens/s at 1, 2, 4, ... requests in flight, until doubling twice no longer helps or the time is used up.

    Args:
        session: A session whose scoring questions were answered.
        tokens: Tokens of each request; the server's context caps them.
        batch: Sequences of one training step, for the forecast.

    Raises:
        ConfigError: the context is too short to measure anything.
        TopkdError: the server failed every request of the first level.
    """
    length = min(tokens, (session.info.max_model_len or tokens + 1) - 1)
    if length < 16:
        raise ConfigError("the server's context is too short for --load", got=length, expected="at least 16 tokens")
    k = session.k
    levels: list[LoadLevel] = []
    saturated = False
    began = time.perf_counter()
    for concurrency in _LEVELS:
        if levels:
            expected = levels[-1].p50_s * 2 * max(2, 8 // concurrency)
            if expected > _LEVEL_S or time.perf_counter() - began + expected > _BUDGET_S:
                break
        levels.append(await _level(session, concurrency, length, k))
        # One level may be disturbed by other users of the server; two in a row say that it is full.
        saturated = len(levels) > 2 and max(level.tokens_per_s for level in levels[-2:]) < _GAIN * max(
            level.tokens_per_s for level in levels[:-2]
        )
        if saturated:
            break
    best = max(levels, key=lambda level: level.tokens_per_s)
    return Load(
        prompt_tokens=length,
        k=k,
        levels=tuple(levels),
        best=best.concurrency,
        tokens_per_s=best.tokens_per_s,
        batch=batch,
        steps_per_hour=3600.0 * best.tokens_per_s / (batch * length),
        saturated=saturated,
    )


async def _level(session: Session, concurrency: int, length: int, k: int) -> LoadLevel:
    least, most = concurrency * max(2, 8 // concurrency), concurrency * _MOST
    seconds: list[float] = []
    failures: list[TopkdError] = []
    count = 0

    async def worker() -> None:
        nonlocal count
        while count < least or (count < most and time.perf_counter() - began < _ENOUGH_S):
            number, count = count, count + 1
            ids = build_long_prompt(session, length, seed=1000 * concurrency + number)
            started = time.perf_counter()
            try:
                await session.teacher.score(ids, 0, k)
            except TopkdError as error:
                failures.append(error)
            else:
                seconds.append(time.perf_counter() - started)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    elapsed = time.perf_counter() - began
    if not seconds:
        raise failures[0]
    return LoadLevel(
        concurrency=concurrency,
        requests=count,
        failed=len(failures),
        tokens_per_s=len(seconds) * length / elapsed,
        p50_s=float(np.percentile(seconds, 50)),
        p95_s=float(np.percentile(seconds, 95)),
    )


def list_advice(dialect: str, capabilities: Capabilities, load: Load | None) -> tuple[str, ...]:
    """List serve flags worth changing, most useful first."""
    if not dialect.startswith("vllm") or capabilities.score_k is None:
        return ()
    if EMBEDDED in capabilities.version:  # it has none of vLLM's flags but one
        low = 0 < capabilities.score_k < 20
        return ("--max-logprobs 20 (or 64): the default run asks for K = 20",) if low else ()
    lines = []
    if 0 < capabilities.score_k < 20:
        lines.append("--max-logprobs 20 (or 64): the default run asks for K = 20")
    if dialect == "vllm":
        lines.append("--enable-scale-out: /inference/v1/generate scores at about a third of the server's time")
    elif capabilities.candidates is None:
        lines.append("VLLM_USE_V2_MODEL_RUNNER=1: model runner V2 scores candidates (support = student or union)")
    if load is not None and load.levels and load.tokens_per_s < 1.5 * load.levels[0].tokens_per_s:
        # One request alone already fills it: the work is serialising replies, or the model itself.
        lines.append("--api-server-count 2 or more: concurrency gains little here; replies may wait to be serialised")
    if load is not None and any(level.failed for level in load.levels):
        lines.append("--max-num-batched-tokens lower, or more memory: requests failed under load")
    if load is not None and not load.saturated:
        lines.append("raise max_in_flight on our side: the server was not saturated")
    return tuple(lines)
