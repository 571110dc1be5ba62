"""Questions in SGLang's words: shared candidates, and routes for new weights."""

from __future__ import annotations

from functools import partial

import numpy as np

from topkd.clients.dialects.sglang import Sglang
from topkd.clients.probe import scores as probe_scores
from topkd.clients.probe import tokens as probe_tokens
from topkd.clients.probe import vllm as probe_vllm
from topkd.clients.probe.scores import ask_teacher
from topkd.clients.probe.session import OPERATION, SCORING, SERVER, TOKENS, Session

_SYNC = {
    "disk": ("disk reload", ("/update_weights_from_disk", "/pause_generation", "/continue_generation")),
    "distributed": ("NCCL", ("/init_weights_update_group", "/update_weights_from_distributed")),
    "lora": ("LoRA adapters", ("/load_lora_adapter",)),
}


async def check_sglang_candidates(session: Session) -> None:
    """Score chosen ids at every position through one shared list; the values must be the scores'."""
    if not isinstance(session.client, Sglang):
        return
    ids = session.prompt[:6]
    truth = await session.teacher.score(ids, 0, 1)
    got = await session.client.score_candidates(ids, 0, ids[1:, None])
    off = float(np.abs(got[:, 0] - truth.actual_logp).max())
    right = off < 0.02
    if right:
        session.know(candidates="shared", candidates_k=-1)
    session.report(
        "ok" if right else "warn",
        "shared" if right else "wrong values",
        "one list for all positions" if right else f"{off:.2g} nats from the scores",
    )


async def check_sglang_sync(session: Session) -> None:
    """List ways for new weights, by which routes are mounted; nothing is called."""
    await session.report_sync(_SYNC)


async def ask_sglang(session: Session) -> None:
    """Ask every question of SGLang's native routes."""
    ask = session.ask
    await ask("speculative", SERVER, "speculative decoding", probe_vllm.check_speculative)
    confirm = partial(probe_scores.confirm_widest_k, asked=256, limit=-1)
    if await ask("k_max", SCORING, "largest K", confirm, on_error="fail"):
        session.know(prefix_cached_scoring=True)
        await ask_teacher(session)
        await ask("candidates", SCORING, "candidate scoring", check_sglang_candidates)
        await ask("tokenizer", TOKENS, "the student's tokenizer", probe_tokens.check_tokenizer)
        await ask("speed", OPERATION, "speed of scoring", probe_scores.measure_speed)
    await ask("sync", OPERATION, "new weights", check_sglang_sync)
