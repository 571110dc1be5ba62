"""Questions in vLLM's words: the limit on K, temperatures, sentinels, candidates, routes, speculative decoding."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

import numpy as np

from topkd.clients.decoding.binary import read_npy_matrix
from topkd.clients.decoding.vllm import read_vllm_scores
from topkd.clients.dialects.vllm import build_vllm_score
from topkd.clients.http.endpoint import RequestInfo
from topkd.clients.probe import scores as probe_scores
from topkd.clients.probe import tokens as probe_tokens
from topkd.clients.probe.scores import ask_teacher
from topkd.clients.probe.session import OPERATION, SCORING, SERVER, TOKENS, Session
from topkd.topk.errors import (
    ContextLimitError,
    FinalServerError,
    KLimitError,
    RequestRefusedError,
    ResponseError,
    UnsupportedError,
)
from topkd.topk.types import Int32, TopK

ROUTE, GENERATE = "/v1/completions", "/inference/v1/generate"
_HUGE = 10_000_000  # above any vocabulary
_CONFIRMED = 1024
_ASKED = re.compile(r"logprobs of (\d+)")
_SAME = 2e-2


async def score_limit(session: Session) -> None:
    """Find the largest K: from the text of a refusal, then confirmed by a score of that width."""
    limit = await _stated_limit(session)
    confirmed = min(_CONFIRMED, limit if limit >= 0 else session.capabilities.vocab_size or _CONFIRMED)
    if limit == 0:
        session.report("fail", "0", "the server scores no list (max_logprobs 0)")
        return
    scores = await session.teacher.score(session.prompt, 0, confirmed)
    session.seen_ids.update(scores.ids[scores.listed].tolist())
    session.know(score_k=limit)
    small = 0 < limit < 20
    session.report(
        "warn" if small else "ok",
        "no limit" if limit < 0 else str(limit),
        ("below the default K = 20: serve with --max-logprobs 20 or more; " if small else "")
        + f"confirmed on {scores.rows} rows"
        if confirmed >= limit > 0
        else f"K = {scores.k} confirmed",
    )
    mass = float(scores.mass().mean())
    session.add(
        "mass",
        SCORING,
        f"mass inside the top {min(session.k, scores.k)}",
        "info",
        f"{100 * float(scores.slice(k=min(session.k, scores.k)).mass().mean()):.1f} %",
        f"{100 * mass:.1f} % at K = {scores.k}" if scores.k > session.k else "",
    )


async def _stated_limit(session: Session) -> int:
    """Find the server's own limit (-1 = none), learnt by asking for far too many; the vocabulary by asking for all."""
    body = build_vllm_score(session.info.model, session.prompt[:2], _HUGE)
    try:
        reply = await session.wire.post(ROUTE, body, entries=300_000, k=_HUGE)
    except KLimitError as error:
        limit = error.limit if error.limit is not None else 0
        try:
            whole = await session.wire.post(ROUTE, body | {"prompt_logprobs": -1}, entries=max(limit, 0), k=-1)
        except KLimitError as refused:
            asked = _ASKED.search(str(refused.got))
            if asked:
                session.know(vocab_size=int(asked[1]))
            return limit
        except (FinalServerError, ResponseError):
            return limit
        width = len(_rows(whole)[1] or {})
        session.know(vocab_size=width)
        return -1 if limit >= width else limit
    rows = _rows(reply)
    width = len(rows[1] or {})
    session.know(vocab_size=width)
    return -1


def _rows(reply: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Read ``prompt_logprobs`` of a reply; refuse one of a server that ignored the field."""
    try:
        rows = reply["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        rows = None
    if not isinstance(rows, list) or len(rows) < 2 or not isinstance(rows[1], dict):
        raise ResponseError(
            "it answers 200 to prompt_logprobs but leaves the scores out: it generates, it does not score"
        )
    return rows


async def score_temperature(session: Session) -> None:
    """Check that scores do not follow the sampling parameters of their request."""
    plain, heated = [await _scored(session, fields) for fields in ({}, {"temperature": 2.0})]
    difference = float(np.abs(plain.actual_logp - heated.actual_logp).max())
    same = difference < _SAME
    if same:
        session.know(score_temp="none")
    session.report(
        "ok" if same else "fail",
        "ignored" if same else "followed",
        "as they must be in a score" if same else "its scores follow the sampling temperature",
    )


async def _scored(session: Session, fields: dict[str, Any]) -> TopK:
    k = session.k
    body = build_vllm_score(session.info.model, session.prompt, k) | fields
    return await session.client.endpoint.call(
        "POST",
        ROUTE,
        body,
        decode=lambda reply: read_vllm_scores(reply, ids=session.prompt, start=0, k=k)[0],
        where=session.client.where("temperature"),
        asks=RequestInfo(tokens=int(session.prompt.size), entries=int(session.prompt.size) * (k + 1), k=k),
    )


async def check_context_room(session: Session) -> None:
    """Find the longest prompt: a score generates one token that is thrown away, so prompt + 1 must fit."""
    limit = session.info.max_model_len
    session.know(max_model_len=limit)
    if limit is None:
        session.report("unknown", "not stated", "the server does not say its context")
        return
    ids = np.resize(session.prompt, limit)
    try:
        await session.wire.post(ROUTE, build_vllm_score(session.info.model, ids, 1), tokens=limit, entries=4 * limit)
    except (ContextLimitError, RequestRefusedError):
        session.report("ok", f"{limit - 1:,} tokens", f"prompt + 1 fit {limit:,}")
        return
    session.report("ok", f"{limit:,} tokens", "a full context is scored")


async def check_vllm_candidates(session: Session) -> None:
    """Score chosen ids at every position: which schema, and are the values right?"""
    if not await session.wire.mounted(GENERATE):
        detail = f"{GENERATE} is not mounted (vLLM: --enable-scale-out)"
        session.report("info", "no", detail)
        return
    ids = session.prompt[:6]
    truth = (await session.teacher.score(ids, 0, session.k)).actual_logp
    wanted: list[Any] = [[int(token)] for token in ids[1:]]
    try:
        got = await _matrix(session, ids, wanted, rows=ids.size - 1, k=1)
        schema, right = "rows", float(np.abs(got[:, 0] - truth).max())
    except UnsupportedError as error:
        session.report("info", "no", error.hint or error.what)
        return
    except RequestRefusedError as refused:
        if "valid list" not in str(refused) and "list_type" not in str(refused):
            session.report("info", "no", refused.what.split(": ", 1)[-1])
            return
        shared = sorted({int(token) for token in ids[1:]})
        got = await _matrix(session, ids, shared, rows=ids.size - 1, k=len(shared))
        columns = np.searchsorted(shared, ids[1:])
        schema, right = "shared", float(np.abs(got[np.arange(ids.size - 1), columns] - truth).max())
    except ResponseError as error:
        session.report("info", "no", error.what)
        return
    if right > 0.3:
        session.report("warn", "wrong values", f"{right:.2g} nats from the scores")
        return
    session.know(candidates=schema, candidates_k=session.capabilities.score_k or 0)
    schema_text = "own ids per position" if schema == "rows" else "one list for all"
    session.report(
        "ok", schema, f"{schema_text}; as scored" if right < _SAME else f"{schema_text}; {right:.1g} nats off"
    )


async def _matrix(session: Session, ids: Int32, wanted: list[Any], *, rows: int, k: int) -> np.ndarray:
    sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprob_token_ids": wanted, "detokenize": False}
    body = {"model": session.info.model, "token_ids": ids.tolist(), "sampling_params": sampling}
    text = (await session.wire.post(GENERATE, body)).get("prompt_token_id_logprobs")
    if not isinstance(text, str):
        raise ResponseError("it answers 200 without prompt_token_id_logprobs: the field was ignored")
    try:
        return read_npy_matrix(base64.b64decode(text, validate=True), rows=rows, k=k)
    except binascii.Error as error:
        raise ResponseError("prompt_token_id_logprobs is not base64") from error


async def check_suffix_scores(session: Session) -> None:
    """Check whether a score can leave the prompt's rows out; on no released vLLM it can."""
    start = int(session.prompt.size) - 3
    sampling = {"max_tokens": 1, "prompt_logprobs": 1, "prompt_logprob_start": start, "detokenize": False}
    body = {"model": session.info.model, "token_ids": session.prompt.tolist(), "sampling_params": sampling}
    try:
        rows = (await session.wire.post(GENERATE, body)).get("prompt_logprobs")
    except FinalServerError:
        rows = None
    short = isinstance(rows, list) and len([row for row in rows if row]) < session.prompt.size - 1
    session.know(suffix_scoring=short)
    session.report("info", "yes" if short else "no", "" if short else "every row is computed, sent")


async def check_speculative(session: Session) -> None:
    """Refuse a teacher that decodes speculatively: that corrupts prompt logprobs without a sign in the reply."""
    metrics = await session.wire.text("/metrics")
    info = await session.wire.get("/server_info?config_format=json")
    on = "spec_decode_num_draft" in metrics or _configured(info)
    if on:
        session.report(
            "fail",
            "on",
            "it decodes speculatively, which corrupts prompt logprobs silently: serve it without --speculative-config",
        )
    elif metrics or info:
        session.report("ok", "off", "no draft counters in /metrics" if metrics else "")
    else:
        session.report("unknown", "not visible", "no /metrics and no /server_info to look at")


def _configured(info: dict[str, Any] | None) -> bool:
    """Check whether a configuration dump, of whatever nesting, names a draft model or method."""
    if not isinstance(info, dict):
        return False
    for name, value in info.items():
        if name in {"speculative_config", "speculative_algorithm"} and value not in {None, "", "None"}:
            return True
        if isinstance(value, dict) and _configured(value):
            return True
    return False


_SYNC = {
    "lora": ("LoRA adapters", ("/v1/load_lora_adapter",)),
    "reload": ("disk reload", ("/collective_rpc", "/reset_prefix_cache")),
    "transfer": ("NCCL/IPC", ("/init_weight_transfer_engine", "/update_weights")),
    "pause": ("pause", ("/pause", "/resume")),
}


async def check_vllm_sync(session: Session) -> None:
    """List ways for new weights, by which routes are mounted; nothing is called."""
    await session.report_sync(_SYNC, "fine for a teacher; a student needs VLLM_SERVER_DEV_MODE=1 or --enable-lora")


async def ask_vllm(session: Session) -> None:
    """Ask every question of the vLLM dialects, in an order in which later ones may use earlier answers."""
    ask = session.ask
    await ask("speculative", SERVER, "speculative decoding", check_speculative)
    if await ask("k_max", SCORING, "largest K", score_limit, on_error="fail") and session.scores:
        await ask_teacher(session)
        await ask("score_temperature", SCORING, "sampling temperature", score_temperature)
        await ask("context", SCORING, "longest prompt", check_context_room)
        await ask("candidates", SCORING, "candidate scoring", check_vllm_candidates)
        await ask("suffix", SCORING, "suffix scoring", check_suffix_scores)
        await ask("spelling", TOKENS, "spelling of ids", probe_tokens.check_spelling)
        await ask("vocabulary", TOKENS, "vocabulary", probe_tokens.check_vocabulary_size)
        await ask("tokenizer", TOKENS, "the student's tokenizer", probe_tokens.check_tokenizer)
        await ask("speed", OPERATION, "speed of scoring", probe_scores.measure_speed)
    await ask("sync", OPERATION, "new weights", check_vllm_sync)
