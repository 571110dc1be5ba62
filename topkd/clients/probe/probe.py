"""``probe``: what an endpoint can do, from real requests on a handful of tokens. A 200 proves nothing; values do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Unpack, cast

from topkd.clients.config import ClientConfig
from topkd.clients.connection import ServerOptions, open_client
from topkd.clients.decoding.byte_map import ByteMap, load_bytemap
from topkd.clients.dialects.base import ServerInfo
from topkd.clients.dialects.raw_requests import Wire
from topkd.clients.dialects.records import AUTO, find_dialect
from topkd.clients.probe import cache as probe_cache
from topkd.clients.probe import tokens as probe_tokens
from topkd.clients.probe.findings import Load, ProbeReport, state_probe_verdict
from topkd.clients.probe.load import list_advice, measure_load
from topkd.clients.probe.session import GROUPS, SERVER, Session, Teacher

# A probe asks what will be refused, and must not wait long for what is broken.
# The window starts wide: a load is to be limited by the server, not by us.
CONFIG = ClientConfig(
    max_retries=1, response_retries=0, backoff_s=0.1, backoff_max_s=0.5, read_timeout_s=60.0, window_start=256
)


async def probe(
    url: str,
    *,
    student: str | Path | ByteMap | None = None,
    dialect: str = AUTO,
    load: bool = False,
    load_tokens: int = 2048,
    batch: int = 256,
    cached: bool = False,
    **server: Unpack[ServerOptions],
) -> ProbeReport:
    """Ask a server what it can do.

    Args:
        url: ``http(s)://host:port``.
        student: The student's tokenizer (folder, file, cached Hugging Face id, or a loaded map), to compare ids.
        dialect: "auto" finds it out.
        load: Measure scoring under rising concurrency too.
        load_tokens: Tokens of each request then.
        batch: Sequences of one training step in the forecast.
        cached: A report of the last hour will do, while the server says the same of itself.
        **server: ``model``, ``api_key`` and ``config``, as for ``connect``; see ``ServerOptions``.

    Raises:
        ServerUnreachableError, ServerTimeoutError, AuthError: nothing can be found out.
        ConfigError, ModelNotFoundError: the URL, model or tokenizer cannot be right.
    """
    started = time.perf_counter()
    known = load_bytemap(student) if isinstance(student, str | Path) else student
    client = await open_client(url, dialect=dialect, **(server | {"config": server.get("config") or CONFIG}))
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
        await find_dialect(client.dialect).load_questions()(session)
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
