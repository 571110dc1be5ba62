"""``probe``: what an endpoint can do, from real requests on a handful of tokens. A 200 proves nothing; values do."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import cast

from pydantic import SecretStr

from topkd.clients.config import ClientConfig
from topkd.clients.connection import open_client
from topkd.clients.decoding.byte_map import ByteMap, load_bytemap
from topkd.clients.dialects.base import ServerInfo
from topkd.clients.dialects.fireworks import MAX_K
from topkd.clients.dialects.raw_requests import Wire
from topkd.clients.probe import cache as probe_cache
from topkd.clients.probe import openai as probe_openai
from topkd.clients.probe import sampling as probe_sampling
from topkd.clients.probe import scores as probe_scores
from topkd.clients.probe import sglang as probe_sglang
from topkd.clients.probe import tokens as probe_tokens
from topkd.clients.probe import vllm as probe_vllm
from topkd.clients.probe.findings import Load, ProbeReport, state_probe_verdict
from topkd.clients.probe.load import list_advice, measure_load
from topkd.clients.probe.session import GROUPS, OPERATION, SAMPLING, SCORING, SERVER, TOKENS, Session, Teacher

# A probe asks what will be refused, and must not wait long for what is broken.
# The window starts wide: a load is to be limited by the server, not by us.
CONFIG = ClientConfig(
    max_retries=1, response_retries=0, backoff_s=0.1, backoff_max_s=0.5, read_timeout_s=60.0, window_start=256
)


async def probe(
    url: str,
    *,
    model: str | None = None,
    api_key: str | SecretStr | None = None,
    student: str | Path | ByteMap | None = None,
    dialect: str = "auto",
    load: bool = False,
    load_tokens: int = 2048,
    batch: int = 256,
    cached: bool = False,
    config: ClientConfig | None = None,
) -> ProbeReport:
    """Asks one server what it can do.

    Args:
        url: ``http(s)://host:port``.
        model: Served name; None takes the only one.
        api_key: As for a client.
        student: The student's tokenizer (folder, file, cached Hugging Face id, or a loaded map), to compare ids.
        dialect: "auto" finds it out.
        load: Measure scoring under rising concurrency too.
        load_tokens: Tokens of each request then.
        batch: Sequences of one training step in the forecast.
        cached: A report of the last hour will do, while the server says the same of itself.
        config: Time-outs and retries.

    Raises:
        ServerUnreachableError, ServerTimeoutError, AuthError: nothing can be found out.
        ConfigError, ModelNotFoundError: the URL, model or tokenizer cannot be right.
    """
    started = time.perf_counter()
    known = load_bytemap(student) if isinstance(student, str | Path) else student
    client = await open_client(url, dialect=dialect, model=model, api_key=api_key, config=config or CONFIG)
    async with client:
        wire = Wire(client)
        info = await client.server_info()
        tokens = "" if known is None else known.fingerprint
        kept = probe_cache.read_kept_report(client.endpoint.url, info, tokens) if cached and not load else None
        if kept is not None:
            return kept
        prompt = await probe_tokens.probe_prompt(wire, info.model, known)
        session = Session(client, cast("Teacher", client), wire, info, prompt, known)
        _server(session)
        await _QUESTIONS[client.dialect](session)
        measured = await measure_load(session, tokens=load_tokens, batch=batch) if load and can_teach(session) else None
        found = build_report(session, client.endpoint.url, client.dialect, started, measured)
        probe_cache.keep(found, info, tokens)
        return found


def can_teach(session: Session) -> bool:
    """Whether what was found so far allows teaching."""
    return state_probe_verdict(session.capabilities, tuple(session.findings))[0]


def build_report(session: Session, url: str, dialect: str, started: float, load: Load | None) -> ProbeReport:
    """The report of a session that has asked everything."""
    findings = tuple(sorted(session.findings, key=lambda finding: GROUPS.index(finding.group)))
    can_teach, words = state_probe_verdict(session.capabilities, findings)
    return ProbeReport(
        url=url,
        model=session.info.model,
        dialect=dialect,
        can_teach=can_teach,
        verdict=words,
        capabilities=session.capabilities,
        findings=findings,
        requests=session.wire.requests,
        seconds=time.perf_counter() - started,
        load=load,
        advice=list_advice(dialect, session.capabilities, load),
    )


def _server(session: Session) -> None:
    info: ServerInfo = session.info
    session.know(version=info.version, max_model_len=info.max_model_len)
    others = len(info.models) - 1
    session.add("model", SERVER, "model", "info", info.model, f"and {others} more names" if others > 0 else "")
    short, _, build = info.version.partition("+")
    session.add("version", SERVER, "version", "info", short or "not stated", f"build {build}" if build else "")


async def _ask_vllm(session: Session) -> None:
    """Every question of the vLLM dialects, in an order in which later ones may use earlier answers."""
    ask = session.ask
    await ask("speculative", SERVER, "speculative decoding", probe_vllm.check_speculative)
    if await ask("k_max", SCORING, "largest K", probe_vllm.score_limit, on_error="fail") and session.scores:
        await _ask_teacher(session)
        await ask("score_temperature", SCORING, "sampling temperature", probe_vllm.score_temperature)
        await ask("context", SCORING, "longest prompt", probe_vllm.check_context_room)
        await ask("candidates", SCORING, "candidate scoring", probe_vllm.check_vllm_candidates)
        await ask("suffix", SCORING, "suffix scoring", probe_vllm.check_suffix_scores)
        await ask("spelling", TOKENS, "spelling of ids", probe_tokens.check_spelling)
        await ask("vocabulary", TOKENS, "vocabulary", probe_tokens.check_vocabulary)
        await ask("tokenizer", TOKENS, "the student's tokenizer", probe_tokens.check_tokenizer)
        await ask("speed", OPERATION, "speed of scoring", probe_scores.measure_speed)
    await ask("sync", OPERATION, "new weights", probe_vllm.check_vllm_sync)


async def _ask_teacher(session: Session) -> None:
    """What any teacher must answer, through its client."""
    ask = session.ask
    await ask("realised_token", SCORING, "realised token's logprob", probe_scores.check_realised_token, on_error="fail")
    await ask("alignment", SCORING, "alignment self-test", probe_scores.check_self_scores, on_error="fail")
    await ask("sampling", SAMPLING, "ids and logprobs", probe_sampling.check_sampling_list)
    await ask("sample_temperature", SAMPLING, "logprobs are of", probe_sampling.sample_temperature)


async def _ask_sglang(session: Session) -> None:
    ask = session.ask
    await ask("speculative", SERVER, "speculative decoding", probe_vllm.check_speculative)
    confirm = partial(probe_scores.confirm_widest_k, asked=256, limit=-1)
    if await ask("k_max", SCORING, "largest K", confirm, on_error="fail"):
        session.know(prefix_cached_scoring=True)
        await _ask_teacher(session)
        await ask("candidates", SCORING, "candidate scoring", probe_sglang.check_sglang_candidates)
        await ask("tokenizer", TOKENS, "the student's tokenizer", probe_tokens.check_tokenizer)
        await ask("speed", OPERATION, "speed of scoring", probe_scores.measure_speed)
    await ask("sync", OPERATION, "new weights", probe_sglang.check_sglang_sync)


async def _ask_fireworks(session: Session) -> None:
    ask = session.ask
    confirm = partial(probe_scores.confirm_widest_k, asked=MAX_K, limit=MAX_K)
    if await ask("k_max", SCORING, "largest K", confirm, on_error="fail"):
        await _ask_teacher(session)
        await ask("tokenizer", TOKENS, "the student's tokenizer", probe_tokens.check_tokenizer)
        await ask("speed", OPERATION, "speed of scoring", probe_scores.measure_speed)


async def _ask_openai(session: Session) -> None:
    """An OpenAI-compatible server: does it score after all, does its echo hold, what do its draws carry?"""
    ask = session.ask
    if await ask("k_max", SCORING, "largest K", probe_vllm.score_limit, on_error="fail"):
        session.add("dialect", SERVER, "dialect", "warn", "vllm, it seems", "it scores: probe it with --dialect vllm")
    await ask("echo", SCORING, "echo", probe_openai.check_echo)
    await ask("sampling", SAMPLING, "chat draws", probe_openai.check_chat_sampling)


_QUESTIONS = {
    "vllm": _ask_vllm,
    "vllm_generate": _ask_vllm,
    "sglang": _ask_sglang,
    "fireworks": _ask_fireworks,
    "openai": _ask_openai,
}
