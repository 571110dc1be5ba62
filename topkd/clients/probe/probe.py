"""``probe``: what an endpoint can do, from real requests on a handful of tokens. A 200 proves nothing; values do.

Reports are kept, so that a run that starts twice an hour asks its server once. One is used again only for the same URL,
model and student tokenizer, within its time, and while the server still states the same version, context and models.
It holds no key.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Unpack, cast

import xxhash

import topkd
from topkd.clients.config import ClientConfig
from topkd.clients.connection import open_client
from topkd.clients.decoding.byte_map import ByteMap, load_bytemap
from topkd.clients.dialects.base import ServerInfo, ServerOptions, Wire
from topkd.clients.dialects.records import AUTO, find_dialect
from topkd.clients.http.recorder import Recorder
from topkd.clients.http.transport import HttpTransport
from topkd.clients.probe import tokens as probe_tokens
from topkd.clients.probe.findings import Capabilities, Finding, Load, ProbeReport, state_probe_verdict
from topkd.clients.probe.load import list_advice, measure_load
from topkd.clients.probe.session import GROUPS, SERVER, Session, Teacher
from topkd.files import write_atomically
from topkd.topk.errors import ConfigError

# A probe asks what will be refused, and must not wait long for what is broken.
# The window starts wide: a load is to be limited by the server, not by us.
CONFIG = ClientConfig(
    max_retries=1,
    response_retries=0,
    pause_timeout_s=60.0,
    backoff_s=0.1,
    backoff_max_s=0.5,
    read_timeout_s=60.0,
    window_start=256,
)
MAX_AGE_S = 3600.0
_FORMAT = 1


async def probe(
    url: str,
    *,
    student: str | Path | ByteMap | None = None,
    dialect: str = AUTO,
    load: bool = False,
    load_tokens: int = 2048,
    batch: int = 256,
    cached: bool = False,
    record: str | Path | None = None,
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
        cached: A report of the last hour will do, while the server states the same of itself.
        record: A new or empty folder for the whole conversation: a file an exchange, and ``manifest.json``. Keys are
            masked; the server's own words about its host, models and folders are not.
        **server: ``model``, ``api_key`` and ``config``, as for ``connect``; see ``ServerOptions``.

    Raises:
        ServerUnreachableError, ServerTimeoutError, AuthError: nothing can be found out.
        ConfigError, ModelNotFoundError: the URL, model or tokenizer is invalid.
    """
    known = load_bytemap(student) if isinstance(student, str | Path) else student
    options: dict[str, Any] = {**server, "config": server.get("config") or CONFIG}
    asked = partial(_probe, url, student=known, dialect=dialect)
    if record is None:
        return await asked(load=(load_tokens, batch) if load else None, cached=cached, options=options)
    if load or cached:
        raise ConfigError(
            "only the requests of a plain probe are recorded",
            got="--record with " + ("--load" if load else "--cached"),
            hint="leave one of the two out",
        )
    recorder = Recorder(record, HttpTransport(options["config"]))
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    asks = {"url": url, "asked_dialect": dialect, "student": known is not None}
    manifest = {"topkd": topkd.__version__, "date": date, **asks}
    try:
        report = await asked(load=None, cached=False, options=options | {"transport": recorder})
    except BaseException as error:  # an interrupt too: what was recorded is to be readable
        await recorder.finish(manifest | {"error": f"{type(error).__name__}: {error}"})
        raise
    version = report.capabilities.version
    facts = {"dialect": report.dialect, "model": report.model, "version": version, "report": report.as_json()}
    await recorder.finish(manifest | facts)
    return report


async def _probe(
    url: str,
    *,
    student: ByteMap | None,
    dialect: str,
    load: tuple[int, int] | None,
    cached: bool,
    options: dict[str, Any],
) -> ProbeReport:
    started = time.perf_counter()
    client = await open_client(url, dialect=dialect, **options)
    async with client:
        wire = Wire(client)
        info = await client.server_info()
        tokens = "" if student is None else student.fingerprint
        kept = read_kept_report(client.endpoint.url, info, tokens) if cached and not load else None
        if kept is not None:
            return kept
        prompt = await probe_tokens.probe_prompt(wire, info.model, student)
        session = Session(client, cast("Teacher", client), wire, info, prompt, student)
        _server(session)
        await find_dialect(client.dialect).load_questions()(session)
        measured = None
        if load is not None and can_teach(session):
            measured = await measure_load(session, tokens=load[0], batch=load[1])
        found = build_report(session, client.endpoint.url, client.dialect, started, measured)
        keep_report(found, info, tokens)
        return found


def can_teach(session: Session) -> bool:
    """Check that what was found so far allows teaching."""
    return state_probe_verdict(session.capabilities, tuple(session.findings))[0]


def build_report(session: Session, url: str, dialect: str, started: float, load: Load | None) -> ProbeReport:
    """Build the report of a session that has asked everything."""
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


def find_probe_folder() -> Path:
    """Return the folder of kept reports, ``$XDG_CACHE_HOME/topkd/probes``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topkd" / "probes"


def read_kept_report(url: str, info: ServerInfo, student: str, *, max_age_s: float = MAX_AGE_S) -> ProbeReport | None:
    """Read the kept report for what this server states of itself; None when there is none that may be used."""
    try:
        kept = json.loads(_place(url, info, student).read_text(encoding="utf-8"))
        fresh = 0 <= time.time() - kept["at"] <= max_age_s
        if kept["format"] != _FORMAT or kept["server"] != _identity(url, info, student) or not fresh:
            return None
        return _report(kept["report"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a file that cannot be read is a report that was never kept


def keep_report(report: ProbeReport, info: ServerInfo, student: str) -> None:
    """Keep a report; a folder that cannot be written to keeps nothing."""
    place = _place(report.url, info, student)
    server = _identity(report.url, info, student)
    kept = {"format": _FORMAT, "at": time.time(), "server": server, "report": report.as_json()}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps(kept))
    except OSError:
        return


def _identity(url: str, info: ServerInfo, student: str) -> list[Any]:
    return [url, info.model, info.max_model_len, info.version, sorted(info.models), student]


def _place(url: str, info: ServerInfo, student: str) -> Path:
    return find_probe_folder() / f"{xxhash.xxh3_128_hexdigest(json.dumps(_identity(url, info, student)).encode())}.json"


def _report(value: dict[str, Any]) -> ProbeReport:
    known = {field.name for field in fields(ProbeReport)}
    value = {name: item for name, item in value.items() if name in known}
    capabilities = value["capabilities"]
    return ProbeReport(
        **value
        | {
            "capabilities": Capabilities(**capabilities | {"sync": tuple(capabilities["sync"])}),
            "findings": tuple(Finding(**finding) for finding in value["findings"]),
            "advice": tuple(value["advice"]),
            "load": None,  # a load is measured anew: it is about the server's other users too
        }
    )
