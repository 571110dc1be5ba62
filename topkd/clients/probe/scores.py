"""Questions about scoring that any dialect answers through its client: realised token, alignment, speed."""

from __future__ import annotations

import time
from functools import partial

import numpy as np

from topkd.clients.dialects.fireworks import MAX_K
from topkd.clients.probe import sampling as probe_sampling
from topkd.clients.probe import tokens as probe_tokens
from topkd.clients.probe.alignment import EXACT, check_alignment
from topkd.clients.probe.session import OPERATION, SAMPLING, SCORING, TOKENS, Session
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Int32

DRAWN = 12
_SPEED_TOKENS = 512


async def confirm_widest_k(session: Session, asked: int, *, limit: int) -> None:
    """Confirms K on a dialect whose limit is known beforehand (-1 = none)."""
    scores = await session.teacher.score(session.prompt, 0, asked)
    session.seen_ids.update(scores.ids[scores.listed].tolist())
    session.know(score_k=limit, suffix_scoring=True, score_temp="unknown")
    session.add(
        "k_max",
        SCORING,
        "largest K",
        "ok" if limit < 0 or limit >= 20 else "warn",
        "no limit" if limit < 0 else str(limit),
        f"K = {asked} confirmed on {scores.rows} rows",
    )


async def check_realised_token(session: Session) -> None:
    """The exact logprob of the token that is there, whether or not it is among the K."""
    scores = await session.teacher.score(session.prompt, 0, 1)
    session.seen_ids.update(scores.ids.ravel().tolist())
    outside = int((scores.actual_ids != scores.ids[:, 0]).sum())
    known = int(np.isfinite(scores.actual_logp).sum())
    ok = known == scores.rows
    session.add(
        "realised_token",
        SCORING,
        "realised token's logprob",
        "ok" if ok else "fail",
        "exact" if ok else "missing",
        f"{known} of {scores.rows} rows, {outside} not the top 1"
        if ok
        else f"the realised token has no logprob in {scores.rows - known} of {scores.rows} rows",
    )


async def check_self_scores(session: Session) -> None:
    """Scores what was just drawn, greedily and at temperature 1, against the logprobs it was drawn with."""
    prompt = session.prompt
    drawn: list[Rollout] = []
    seconds = 0.0
    for params in (SamplingParams(DRAWN, temperature=0.0), SamplingParams(DRAWN, seed=1)):
        started = time.perf_counter()
        rollouts, logp = await _draw(session, prompt, params)
        seconds = time.perf_counter() - started
        drawn += [_with_logp(rollout, logp) for rollout in rollouts]
    session.seen_ids.update(int(token) for rollout in drawn for token in rollout.completion_ids)
    tests = []
    for rollout in drawn:
        full = np.concatenate([prompt, rollout.completion_ids])
        # One row before the completion, so that a shift is seen in both directions.
        start = max(0, prompt.size - 2)
        scores = await session.teacher.score(full, start, session.k)
        tests.append(check_alignment(scores, rollout.completion_ids, rollout.logp))
    tokens = sum(test.tokens for test in tests)
    worst = max((test.worst for test in tests), key=lambda value: (np.isnan(value), value))
    if all(test.aligned for test in tests):
        noise = worst > EXACT
        session.add(
            "alignment",
            SCORING,
            "alignment self-test",
            "warn" if noise else "ok",
            f"within {max(worst, 1e-6):.1g} nats",
            f"{tokens} draws scored again; 16-bit servers differ by up to 0.1 between prefill and decoding"
            if noise
            else f"{tokens} draws scored again agree",
        )
    else:
        shift = next((test.shift for test in tests if test.shift), None)
        value, why = _misaligned(shift, worst)
        session.add("alignment", SCORING, "alignment self-test", "fail", value, why)
    session.add(
        "sampling_speed",
        OPERATION,
        "sampling, one request",
        "info",
        f"{drawn[-1].completion_ids.size / max(seconds, 1e-9):,.0f} tokens/s",
    )


def _misaligned(shift: int | None, worst: float) -> tuple[str, str]:
    if shift is None:
        return (
            f"off by {worst:.2g} nats",
            f"scores of drawn tokens are up to {worst:.2g} nats from the logprobs they were drawn with",
        )
    side = "after" if shift > 0 else "before"
    return "rows shifted by one", f"its rows are off by one: each is about the token {side} the one it stands for"


async def _draw(session: Session, prompt: Int32, params: SamplingParams) -> tuple[list[Rollout], list[np.ndarray]]:
    rollouts = await session.teacher.sample(prompt, 1, params, k=1)
    logps = []
    for rollout in rollouts:
        if np.isnan(rollout.logp).all() and rollout.topk is not None:
            # A greedy draw has no logprob of its own (it was certain); the server's raw one is in the list.
            logps.append(rollout.topk.actual_logp)
        else:
            logps.append(rollout.logp)
    return rollouts, logps


def _with_logp(rollout: Rollout, logp: list[np.ndarray]) -> Rollout:
    return Rollout(rollout.prompt_ids, rollout.completion_ids, logp[0], rollout.finish_reason, rollout.sampling)


async def measure_speed(session: Session) -> None:
    """Latency of a short score, and tokens/s of a long one, one request at a time."""
    short = []
    for _ in range(3):
        started = time.perf_counter()
        await session.teacher.score(session.prompt, 0, session.k)
        short.append(time.perf_counter() - started)
    session.add(
        "latency",
        OPERATION,
        "latency of a short score",
        "info",
        f"{1e3 * float(np.median(short)):.0f} ms",
        f"{session.prompt.size} tokens, K = {session.k}, median of 3",
    )
    room = (session.info.max_model_len or _SPEED_TOKENS + 1) - 1
    length = max(int(session.prompt.size), min(_SPEED_TOKENS, room))
    long = []
    for seed in range(3):  # the first one of its length may pay for warming up
        ids = build_long_prompt(session, length, seed=seed)
        started = time.perf_counter()
        await session.teacher.score(ids, 0, session.k)
        long.append(time.perf_counter() - started)
    seconds = float(np.median(long))
    session.add(
        "scoring_speed",
        OPERATION,
        "scoring, one request",
        "info",
        f"{length / seconds:,.0f} tokens/s",
        f"{length} tokens, K = {session.k}, median of 3; --load: many",
    )


def build_long_prompt(session: Session, length: int, *, seed: int) -> Int32:
    """``length`` ids that the server is known to take, in an order that no cache has seen."""
    known = np.array(sorted(set(session.prompt.tolist())), dtype=np.int32)
    return np.random.default_rng([seed, length]).choice(known, length).astype(np.int32)


async def ask_teacher(session: Session) -> None:
    """What any teacher must answer, through its client."""
    ask = session.ask
    await ask("realised_token", SCORING, "realised token's logprob", check_realised_token, on_error="fail")
    await ask("alignment", SCORING, "alignment self-test", check_self_scores, on_error="fail")
    await ask("sampling", SAMPLING, "ids and logprobs", probe_sampling.check_sampling_list)
    await ask("sample_temperature", SAMPLING, "logprobs are of", probe_sampling.sample_temperature)


async def ask_echo_teacher(session: Session) -> None:
    """Ask every question of a server that scores by echo."""
    ask = session.ask
    confirm = partial(confirm_widest_k, asked=MAX_K, limit=MAX_K)
    if await ask("k_max", SCORING, "largest K", confirm, on_error="fail"):
        await ask_teacher(session)
        await ask("tokenizer", TOKENS, "the student's tokenizer", probe_tokens.check_tokenizer)
        await ask("speed", OPERATION, "speed of scoring", measure_speed)
