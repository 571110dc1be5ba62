"""Questions about sampling that any dialect answers through its client: ids, exact logprobs, and what they are of."""

from __future__ import annotations

import numpy as np

from topkd.clients.probe.findings import SampleTemp, Status
from topkd.clients.probe.session import SAMPLING, Session
from topkd.topk.errors import ResponseError
from topkd.topk.samples import SamplingParams

_SAME = 2e-2
_SAID: dict[SampleTemp, tuple[Status, str, str]] = {
    "raw": ("ok", "the model itself", "so draw at temperature 1, untruncated"),
    "temperature": ("info", "tempered model", "so draw at temperature 1, untruncated"),
    "processed": ("warn", "the draw", "they follow temperature and truncation: logprobs_mode='processed_logprobs'"),
    "unknown": ("warn", "unclear", "they fit neither the scores nor their tempered form"),
}


async def check_sampling_list(session: Session) -> None:
    """Ids and exact logprobs of sampled tokens, and the sampler's own list with them."""
    [rollout] = await session.teacher.sample(session.prompt, 1, SamplingParams(2, seed=2), k=session.sample_k)
    exact = bool(np.isfinite(rollout.logp).all())
    session.know(sample_k=session.capabilities.score_k)
    session.add(
        "sampling",
        SAMPLING,
        "ids and logprobs",
        "ok" if exact else "warn",
        "exact" if exact else "unknown logprobs",
        f"and the sampler's own top {session.sample_k}" + (f", weights {rollout.version!r}" if rollout.version else ""),
    )


async def sample_temperature(session: Session) -> None:
    """What sampled logprobs are of, from a draw at temperature 2 and one with all but the top token cut off."""
    start = int(session.prompt.size) - 1
    rows = await session.teacher.score(np.append(session.prompt, session.prompt[-1]), start, session.k)
    raw = dict(zip(rows.ids[0].tolist(), rows.logp[0].tolist(), strict=True))
    hot = await _listed(session, SamplingParams(1, temperature=2.0, seed=3))
    cut = await _listed(session, SamplingParams(1, min_p=1.0, seed=3))
    kind = check_sampled_kind(raw, hot, cut)
    session.know(sample_temp=kind)
    status, value, detail = _SAID[kind]
    session.add("sample_temperature", SAMPLING, "logprobs are of", status, value, detail)
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
    """How logprobs of a draw at temperature 2, and one of only the top token, relate to the scores."""
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
    """The sampler's list as served, whatever the client makes of the draw's own logprob."""
    [rollout] = await session.teacher.sample(session.prompt, 1, params, k=session.sample_k)
    if rollout.topk is None:
        raise ResponseError("sampled tokens come without a list")
    kept = rollout.topk.ids[0] >= 0
    return dict(zip(rollout.topk.ids[0][kept].tolist(), rollout.topk.logp[0][kept].tolist(), strict=True))
