"""Questions that any dialect answers through its client: realised token, alignment, sampling, speed.

The alignment self-test draws a completion together with its logprobs, then scores it; the two must agree token by
token. Some servers answer in the right shape with rows of the neighbouring token, and nothing in one reply shows it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from topkd.clients.dialects.base import ScoringClient
from topkd.clients.dialects.records import find_dialect
from topkd.clients.probe import tokens as probe_tokens
from topkd.clients.probe.findings import SampleTemp, Status
from topkd.clients.probe.session import OPERATION, SAMPLING, SCORING, TOKENS, Session
from topkd.topk.errors import ResponseError
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Float32, Int32, TopK

DRAWN = 12
_SPEED_TOKENS = 512
_USUAL_K = 20  # the default of a run
EXACT = 5e-3  # above float32 noise over thousands of tokens, below a systematic error of 0.01
NOISE = 0.3  # 16-bit servers differ by up to this between prefill and decoding; other rows differ by nats
_SAME = 2e-2
_SAMPLED_KINDS: dict[SampleTemp, tuple[Status, str, str]] = {
    "raw": ("ok", "the model itself", "so draw at temperature 1, untruncated"),
    "temperature": ("info", "tempered model", "so draw at temperature 1, untruncated"),
    "processed": ("warn", "the draw", "they follow temperature and truncation: logprobs_mode='processed_logprobs'"),
    "unknown": ("warn", "unclear", "they fit neither the scores nor their tempered form"),
}


@dataclass(frozen=True, slots=True)
class Alignment:
    """How scores compare with the logprobs that the same tokens were drawn with.

    Attributes:
        tokens: Compared.
        worst: Largest absolute difference, in nats; NaN when nothing could be compared.
        shift: 0 when the rows are where they should be, +1 when row i is about the token *after* its own, -1 when it
            is about the one before; None when they fit nowhere.
    """

    tokens: int
    worst: float
    shift: int | None

    @property
    def aligned(self) -> bool:
        """Whether each row scores its own token, not the one before or after it."""
        return self.shift == 0


def check_alignment(scores: TopK, tokens: Int32, drawn_logp: Float32) -> Alignment:
    """Compare scored rows with drawn logprobs.

    Args:
        scores: Rows whose last ``len(tokens)`` claim to predict ``tokens``.
        tokens: int32 [C], the drawn completion.
        drawn_logp: float32 [C], the logprobs it was drawn with.
    """
    first = scores.rows - tokens.size
    if tokens.size == 0 or first < 0:
        return Alignment(0, float("nan"), None)
    differences = np.abs(scores.actual_logp[first:].astype(np.float64) - drawn_logp)
    if not np.isfinite(differences).all():
        return Alignment(int(tokens.size), float("nan"), None)
    worst = float(differences.max())
    if worst <= NOISE:
        return Alignment(int(tokens.size), worst, 0)
    for shift in (1, -1):
        if _fits(scores, first - shift, tokens, drawn_logp):
            return Alignment(int(tokens.size), worst, shift)
    return Alignment(int(tokens.size), worst, None)


def _fits(scores: TopK, first: int, tokens: Int32, drawn_logp: Float32) -> bool:
    """Check that rows ``first ..`` list the tokens with the logprobs they were drawn with, wherever both are known."""
    rows: NDArray[np.intp] = np.arange(tokens.size) + first
    inside = (rows >= 0) & (rows < scores.rows)
    hit = scores.ids[rows[inside]] == tokens[inside][:, None]
    listed = hit.any(axis=1)
    logp = np.where(hit, scores.logp[rows[inside]], -np.inf).max(axis=1)
    close = np.abs(logp[listed] - drawn_logp[inside][listed]) <= NOISE
    return bool(listed.any() and close.all())


async def confirm_widest_k(session: Session, asked: int, *, limit: int) -> None:
    """Confirm K on a dialect whose limit is known beforehand (-1 = none)."""
    scores = await session.teacher.score(session.prompt, 0, asked)
    session.seen_ids.update(scores.ids[scores.listed].tolist())
    session.know(score_k=limit, suffix_scoring=True, score_temp="unknown")
    session.report(
        "ok" if limit < 0 or limit >= 20 else "warn",
        "no limit" if limit < 0 else str(limit),
        f"K = {asked} confirmed on {scores.rows} rows",
    )


async def check_realised_token(session: Session) -> None:
    """Check the exact logprob of the token that is there, whether or not it is among the K."""
    scores = await session.teacher.score(session.prompt, 0, 1)
    session.seen_ids.update(scores.ids.ravel().tolist())
    outside = int((scores.actual_ids != scores.ids[:, 0]).sum())
    known = int(np.isfinite(scores.actual_logp).sum())
    ok = known == scores.rows
    session.report(
        "ok" if ok else "fail",
        "exact" if ok else "missing",
        f"{known} of {scores.rows} rows, {outside} not the top 1"
        if ok
        else f"the realised token has no logprob in {scores.rows - known} of {scores.rows} rows",
    )


async def check_self_scores(session: Session) -> None:
    """Score what was just drawn, greedily and at temperature 1, against the logprobs it was drawn with."""
    prompt = session.prompt
    drawn: list[Rollout] = []
    seconds = 0.0
    for params in (SamplingParams(DRAWN, temperature=0.0, seed=1), SamplingParams(DRAWN, seed=1)):
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
        session.report(
            "warn" if noise else "ok",
            f"within {max(worst, 1e-6):.1g} nats",
            f"{tokens} draws scored again; 16-bit servers differ by up to 0.1 between prefill and decoding"
            if noise
            else f"{tokens} draws scored again agree",
        )
    else:
        shift = next((test.shift for test in tests if test.shift), None)
        value, why = _misaligned(shift, worst)
        session.report("fail", value, why)
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


async def check_sampling_list(session: Session) -> None:
    """Check ids and exact logprobs of sampled tokens, and the sampler's own list with them."""
    [rollout] = await session.teacher.sample(session.prompt, 1, SamplingParams(2, seed=2), k=session.sample_k)
    exact = bool(np.isfinite(rollout.logp).all())
    session.know(sample_k=session.capabilities.score_k)
    session.report(
        "ok" if exact else "warn",
        "exact" if exact else "unknown logprobs",
        f"and the sampler's own top {session.sample_k}" + (f", weights {rollout.version!r}" if rollout.version else ""),
    )


async def sample_temperature(session: Session) -> None:
    """Find what sampled logprobs are of, from a draw at temperature 2 and one with all but the top token cut off."""
    start = int(session.prompt.size) - 1
    rows = await session.teacher.score(np.append(session.prompt, session.prompt[-1]), start, session.k)
    raw = dict(zip(rows.ids[0].tolist(), rows.logp[0].tolist(), strict=True))
    hot = await _listed(session, SamplingParams(1, temperature=2.0, seed=3))
    cut = await _listed(session, SamplingParams(1, min_p=1.0, seed=3))
    kind = check_sampled_kind(raw, hot, cut)
    session.know(sample_temp=kind)
    status, value, detail = _SAMPLED_KINDS[kind]
    session.report(status, value, detail)
    zeros = int(sum(np.isneginf(value) for value in cut.values()))
    session.add(
        "not_finite",
        SAMPLING,
        "zero probability",
        "info",
        "served" if zeros else "not provoked",
        f"{zeros} entries of a truncated draw, read as exactly 0" if zeros else "no logprob of -inf came up",
    )


def check_sampled_kind(raw: dict[int, float], hot: dict[int, float], cut: dict[int, float]) -> SampleTemp:
    """Compare logprobs of a draw at temperature 2, and one of only the top token, with the scores."""
    shared = [token for token in hot if token in raw and np.isfinite(hot[token])]
    if len(shared) < 2:
        return "unknown"
    before = np.array([raw[token] for token in shared])
    after = np.array([hot[token] for token in shared])
    if float(np.abs(before - after).max()) < _SAME:
        return "raw"
    # Tempering halves differences; the normaliser needs the whole vocabulary and drops out of them.
    if float(np.abs((before - before[0]) / 2.0 - (after - after[0])).max()) > _SAME:
        return "unknown"
    alive = [value for value in cut.values() if np.isfinite(value)]
    return "processed" if len(alive) == 1 and abs(alive[0]) < _SAME else "temperature"


async def _listed(session: Session, params: SamplingParams) -> dict[int, float]:
    """Draw the sampler's list as served, whatever the client makes of the draw's own logprob."""
    [rollout] = await session.teacher.sample(session.prompt, 1, params, k=session.sample_k)
    if rollout.topk is None:
        raise ResponseError("sampled tokens come without a list")
    kept = rollout.topk.ids[0] >= 0
    return dict(zip(rollout.topk.ids[0][kept].tolist(), rollout.topk.logp[0][kept].tolist(), strict=True))


async def measure_speed(session: Session) -> None:
    """Measure the latency of a short score, and tokens/s of a long one, one request at a time."""
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
    """Build ``length`` ids that the server is known to take, in an order that no cache has seen."""
    known = np.array(sorted(set(session.prompt.tolist())), dtype=np.int32)
    return np.random.default_rng([seed, length]).choice(known, length).astype(np.int32)


async def ask_teacher(session: Session) -> None:
    """Ask what any teacher must answer, through its client."""
    ask = session.ask
    await ask("realised_token", SCORING, "realised token's logprob", check_realised_token, on_error="fail")
    if isinstance(session.client, ScoringClient) and type(session.client).sample is ScoringClient.sample:
        session.add(
            "alignment",
            SCORING,
            "alignment self-test",
            "unknown",
            "not made",
            "the dialect draws nothing to score again",
        )
        return
    await ask("alignment", SCORING, "alignment self-test", check_self_scores, on_error="fail")
    await ask("sampling", SAMPLING, "ids and logprobs", check_sampling_list)
    await ask("sample_temperature", SAMPLING, "logprobs are of", sample_temperature)


async def ask_scorer(session: Session) -> None:
    """Ask what any dialect that scores can answer through its client alone."""
    ask, limit = session.ask, find_dialect(session.client.dialect).max_k
    # Without a stated limit the usual K is tried, and only that K is then known to be served.
    confirm = partial(confirm_widest_k, asked=limit or _USUAL_K, limit=limit or _USUAL_K)
    if await ask("k_max", SCORING, "largest K", confirm, on_error="fail"):
        await ask_teacher(session)
        await ask("tokenizer", TOKENS, "the student's tokenizer", probe_tokens.check_tokenizer)
        await ask("speed", OPERATION, "speed of scoring", measure_speed)
