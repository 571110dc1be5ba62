"""``probe``: what an endpoint can do, from real requests on a handful of tokens. A 200 proves nothing; values do."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import SecretStr

from topkd.clients import probe_scores, probe_tokens, probe_vllm
from topkd.clients.bytemap import ByteMap, load_bytemap
from topkd.clients.config import ClientConfig
from topkd.clients.dialect import ServerInfo
from topkd.clients.probe_findings import Load, ProbeReport, verdict
from topkd.clients.probe_load import advice, measure_load
from topkd.clients.probe_session import GROUPS, OPERATION, SAMPLING, SCORING, SERVER, TOKENS, Session
from topkd.clients.probe_wire import Wire
from topkd.clients.vllm import VllmCompletions

# A probe asks what will be refused, and must not wait long for what is broken.
CONFIG = ClientConfig(max_retries=1, response_retries=0, backoff_s=0.1, backoff_max_s=0.5, read_timeout_s=60.0)


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
        config: Time-outs and retries.

    Raises:
        ServerUnreachableError, ServerTimeoutError, AuthError: nothing can be found out.
        ConfigError, ModelNotFoundError: the URL, model or tokenizer cannot be right.
    """
    started = time.perf_counter()
    known = load_bytemap(student) if isinstance(student, str | Path) else student
    async with VllmCompletions(url, model=model, api_key=api_key, config=config or CONFIG) as client:
        wire = Wire(client)
        info = await client.server_info()
        prompt = await probe_tokens.probe_prompt(wire, info.model, known)
        session = Session(client, client, wire, info, prompt, known)
        await _server(session)
        await ask_vllm(session)
        measured = await measure_load(session, tokens=load_tokens, batch=batch) if load and teaches(session) else None
        return report(session, client.endpoint.url, "vllm", started, measured)


def teaches(session: Session) -> bool:
    """Whether what was found so far allows teaching."""
    return verdict(session.capabilities, tuple(session.findings))[0]


def report(session: Session, url: str, dialect: str, started: float, load: Load | None) -> ProbeReport:
    """The report of a session that has asked everything."""
    findings = tuple(sorted(session.findings, key=lambda finding: GROUPS.index(finding.group)))
    can_teach, words = verdict(session.capabilities, findings)
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
        advice=advice(dialect, session.capabilities, load),
    )


async def _server(session: Session) -> None:
    info: ServerInfo = session.info
    session.know(version=info.version, max_model_len=info.max_model_len)
    others = len(info.models) - 1
    session.add("model", SERVER, "model", "info", info.model, f"and {others} more names" if others > 0 else "")
    session.add(
        "version",
        SERVER,
        "version",
        "info",
        info.version or "not stated",
        "" if info.version else "no GET /version: not a vLLM",
    )


async def ask_vllm(session: Session) -> None:
    """Every question of the vLLM dialects, in an order in which later ones may use earlier answers."""
    ask = session.ask
    await ask("speculative", SERVER, "speculative decoding", probe_vllm.speculative)
    if not await ask("k_max", SCORING, "largest K", probe_vllm.score_limit, on_error="fail"):
        await probe_vllm.sync_routes(session)
        return
    if session.capabilities.score_k is None:
        return
    await ask("realised_token", SCORING, "realised token's logprob", probe_scores.realised_token, on_error="fail")
    await ask("alignment", SCORING, "alignment self-test", probe_scores.self_test, on_error="fail")
    await ask("score_temperature", SCORING, "sampling temperature", probe_vllm.score_temperature)
    await ask("context", SCORING, "longest prompt", probe_vllm.context_room)
    await ask("candidates", SCORING, "candidate scoring", probe_vllm.candidates)
    await ask("suffix", SCORING, "suffix scoring", probe_vllm.suffix)
    await ask("sampling", SAMPLING, "ids and logprobs", probe_scores.sampling_list)
    await ask("sample_temperature", SAMPLING, "logprobs are of", probe_vllm.sample_temperature)
    await ask("spelling", TOKENS, "spelling of ids", probe_tokens.spelling)
    await ask("vocabulary", TOKENS, "vocabulary", probe_tokens.vocabulary)
    await ask("tokenizer", TOKENS, "the student's tokenizer", probe_tokens.tokenizer)
    await ask("speed", OPERATION, "speed of scoring", probe_scores.speed)
    await probe_vllm.sync_routes(session)
