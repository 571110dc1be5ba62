"""Real servers as they were met: what each said, replayed to the clients of today.

A folder below this one is a recording (``topkd probe URL --record DIR``), and is found by itself; see
docs/how-to/add-a-server.md. Numbers are read here by hand from the recorded bytes, not by the package's decoders.
"""

from __future__ import annotations

import base64
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import topkd
from tests.real.replay import FOLDER, RECORDINGS, Recording, load_recording
from topkd.clients.config import ClientConfig
from topkd.clients.probe.findings import ProbeReport
from topkd.clients.probe.probe import probe
from topkd.topk.errors import TopkdError, UnsupportedError

ROOT = FOLDER.parents[1]
ONCE = ClientConfig(max_retries=0, response_retries=0)
TIMED = {"latency", "scoring_speed", "sampling_speed"}  # findings whose value is a time of that day
NAMES = [folder.name for folder in RECORDINGS]


@dataclass(frozen=True)
class Score:
    """One recorded score: what was asked, and what the bytes of the reply hold, in ranked order."""

    ids: list[int]
    start: int
    k: int
    listed: list[list[int]]
    logp: list[list[float]]
    actual_logp: list[float]


def _read_scores(dialect: str, request: dict[str, Any], reply: dict[str, Any]) -> Score | None:
    """Scores of one prompt as a client of the dialect asks for them; None for anything else."""
    if dialect == "sglang":
        return _read_sglang(request, reply)
    sampling = request.get("sampling_params", request)
    ids = request.get("token_ids" if dialect == "vllm_generate" else "prompt")
    k = sampling.get("prompt_logprobs")
    is_raw = sampling.keys() & {"prompt_logprob_start", "echo"} or sampling.get("temperature") == 2.0  # the probe's own
    if not isinstance(ids, list) or k is None or k < 0 or is_raw:
        return None
    rows = reply["prompt_logprobs"] if "token_ids" in request else reply["choices"][0]["prompt_logprobs"]
    ranked = [sorted((e["rank"], int(t), e["logprob"]) for t, e in row.items()) for row in rows[1:]]
    return Score(
        ids, 0, k,
        [[token for rank, token, _ in row if rank <= k] for row in ranked],
        [[logp for rank, _, logp in row if rank <= k] for row in ranked],
        [row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:], strict=True)],
    )  # fmt: skip


def _read_sglang(request: dict[str, Any], reply: dict[str, Any]) -> Score | None:
    ids, start, k = request.get("input_ids"), request.get("logprob_start_len", -1), request.get("top_logprobs_num", 0)
    if not isinstance(ids, list) or not request.get("return_logprob") or start < 0 or "token_ids_logprob" in request:
        return None
    meta = reply["meta_info"]
    listed, logp = np.zeros((len(ids) - 1 - start, 0), "<i4"), np.zeros((len(ids) - 1 - start, 0), "<f4")
    if k:
        shape = meta["input_top_logprobs_shape"]
        listed = np.frombuffer(base64.b64decode(meta["input_top_logprobs_idx_flat_b64"]), "<i4").reshape(shape)
        logp = np.frombuffer(base64.b64decode(meta["input_top_logprobs_val_flat_b64"]), "<f4").reshape(shape)
    actual = [value for value, *_ in meta["input_token_logprobs"]][1:]
    return Score(ids, start, k, listed.tolist(), logp.tolist(), actual)


def _recorded_scores(recording: Recording) -> list[Score]:
    found = []
    for exchange in recording.exchanges:
        if exchange.request.method == "POST" and exchange.reply is not None and exchange.reply.status == 200:
            request, reply = (json.loads(side.body.content) for side in (exchange.request, exchange.reply))
            if isinstance(request, dict) and isinstance(reply, dict):
                found.append(_read_scores(recording.manifest["dialect"], request, reply))
    return [score for score in found if score is not None]


async def check_scores(recording: Recording) -> int:
    """Ask a client for every score of the recording, and compare each number; returns how many scores there were."""
    scores = _recorded_scores(recording)
    with recording.replaying() as url:
        options: dict[str, Any] = {"dialect": recording.manifest["dialect"], "config": ONCE}
        async with await topkd.connect(url, model=recording.manifest["model"], **options) as teacher:
            for score in scores:
                topk = await teacher.score(score.ids, score.start, score.k)
                assert topk.actual_ids.tolist() == score.ids[score.start + 1 :]
                np.testing.assert_allclose(topk.actual_logp, score.actual_logp, rtol=1e-6)
                assert topk.ids.tolist() == score.listed
                np.testing.assert_allclose(topk.logp, score.logp, rtol=1e-6)
    assert recording.unexpected == [], "the client asks otherwise than it was recorded"
    return len(scores)


async def replay_probe(recording: Recording) -> ProbeReport:
    """Probe the recorded server again; every recorded request must come, and no other."""
    dialect = recording.manifest.get("asked_dialect", "auto")
    with recording.replaying() as url:
        report = await probe(url, dialect=dialect)
    assert (recording.unexpected, recording.unused) == ([], [])
    return report


def _comparable(report: dict[str, Any]) -> dict[str, Any]:
    report = copy.deepcopy(report)
    findings = [finding for finding in report["findings"] if finding["key"] not in TIMED]
    return report | {"findings": findings, "url": "", "seconds": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(params=NAMES)
def recording(request: pytest.FixtureRequest) -> Recording:
    return load_recording(FOLDER / request.param)


async def test_a_probe_asks_what_was_recorded_and_finds_what_it_found_then(recording: Recording):
    report = await replay_probe(recording)
    assert _comparable(json.loads(json.dumps(report.as_json()))) == _comparable(recording.manifest["report"])


async def test_every_recorded_score_is_read_to_the_recorded_numbers(recording: Recording):
    if not recording.manifest["report"]["can_teach"]:
        with recording.replaying() as url, pytest.raises(UnsupportedError, match="only samples"):
            await topkd.connect(url, dialect="auto", config=ONCE)
        return
    assert await check_scores(recording) >= 8


def test_a_recording_is_whole_free_of_keys_and_named_in_the_readme(recording: Recording):
    manifest = recording.manifest
    assert (manifest["cut"], manifest["masked"], manifest["student"]) == (0, 0, False)
    assert "error" not in manifest
    assert not [e.number for e in recording.exchanges if e.error or e.reply is None]
    [name] = [name for name in NAMES if load_recording(FOLDER / name).manifest == manifest]
    _, _, version = name.partition("-")
    assert version.startswith(manifest["version"])
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Servers")[2].partition("\n## ")[0]
    assert f"tests/real/{name}" in table, "a server that was met says in the README which, how and when"
    assert manifest["date"][:10] in table


def test_the_servers_that_were_met_are_here():
    assert {name.partition("-")[0] for name in NAMES} >= {"vllm", "sglang", "llama.cpp"}


def _changed(recording: Recording, old: bytes, new: bytes, *, side: str) -> Recording:
    """The same with some bytes replaced wherever they occur in requests, or in replies."""
    changed = copy.deepcopy(recording)
    count = 0
    for exchange in changed.exchanges:
        body = getattr(exchange, side).body
        if isinstance(body.json, msgspec.Raw) and old in bytes(body.json):
            body.json = msgspec.Raw(bytes(body.json).replace(old, new))
            count += 1
    assert count, f"{old!r} occurs in no {side}"
    return changed


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("vllm")])
async def test_the_checks_fail_on_a_number_that_is_not_what_was_sent(name: str, monkeypatch: pytest.MonkeyPatch):
    recording = load_recording(FOLDER / name)
    exact = _recorded_scores(recording)
    value = f'"logprob": {exact[0].actual_logp[3]!r}'.encode()
    changed = _changed(recording, value, b'"logprob": -0.0123', side="reply")
    monkeypatch.setattr("tests.real.test_real._recorded_scores", lambda _: exact)
    with pytest.raises((AssertionError, TopkdError)):
        await check_scores(changed)


@pytest.mark.parametrize("name", NAMES)
async def test_the_checks_fail_on_a_request_that_differs_in_one_byte(name: str):
    recording = load_recording(FOLDER / name)
    changed = _changed(recording, b'"temperature": ', b'"temperature": 1', side="request")
    with pytest.raises((AssertionError, TopkdError)):
        await replay_probe(changed)
