"""Probe reports kept per endpoint, so that a run that starts twice an hour asks its server once.

A report is used again only for the same URL, model and student tokenizer, within its time, and while the server still
states the same version, context and models. It holds no key.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import xxhash

from topkd.clients.dialects.base import ServerInfo
from topkd.clients.probe.findings import Capabilities, Finding, ProbeReport

MAX_AGE_S = 3600.0
_FORMAT = 1


def find_probe_folder() -> Path:
    """``$XDG_CACHE_HOME/topkd/probes``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topkd" / "probes"


def read_kept_report(url: str, info: ServerInfo, student: str, *, max_age_s: float = MAX_AGE_S) -> ProbeReport | None:
    """The kept report for what this server says of itself; None when there is none that may be used."""
    try:
        kept = json.loads(_place(url, info, student).read_text(encoding="utf-8"))
        fresh = 0 <= time.time() - kept["at"] <= max_age_s
        if kept["format"] != _FORMAT or kept["server"] != _identity(url, info, student) or not fresh:
            return None
        return _report(kept["report"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a file that cannot be read is a report that was never kept


def keep(report: ProbeReport, info: ServerInfo, student: str) -> None:
    """Writes a report down; a folder that cannot be written to keeps nothing."""
    place = _place(report.url, info, student)
    server = _identity(report.url, info, student)
    kept = {"format": _FORMAT, "at": time.time(), "server": server, "report": report.as_json()}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(kept), encoding="utf-8")
        partial.replace(place)
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
