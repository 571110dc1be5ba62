"""``probe`` on running servers: what it says must be what the suite found out the long way."""

from __future__ import annotations

import pytest

from tests.contract.conftest import API_KEY
from tests.contract.servers import Endpoint
from topkd.clients.probe.probe import probe
from topkd.compose.data.byte_maps import load_student_byte_map


async def test_the_probe_finds_the_servers_limits_and_passes_it_as_a_teacher(server: Endpoint):
    report = await probe(server.url, api_key=server.api_key, student=load_student_byte_map(server.model_dir))
    assert report.can_teach, report.verdict
    assert f"K <= {server.max_logprobs}" in report.verdict
    can = report.capabilities
    assert (can.score_k, can.max_model_len, can.vocab_size) == (server.max_logprobs, server.max_model_len, 2048)
    assert (can.score_temp, can.sample_temp) == ("none", "raw")
    assert can.evidence == "probed"
    assert {finding.key for finding in report.findings if finding.status == "fail"} == set()
    for key in ("alignment", "realised_token"):
        assert report[key].status == "ok", f"{key}: {report[key].value} {report[key].detail}"
    # transformers gives a Qwen2 model its own pre-tokenizer, whatever tokenizer.json says: both servers cut texts that
    # way, and so will a trainer, so this is the student's own tokenizer.
    assert (report["tokenizer"].status, report["tokenizer"].value) == ("ok", "yes"), report["tokenizer"]
    assert "a test text gives the same ids" in report["tokenizer"].detail
    # A stock vLLM on CPU mounts the route and lacks the runner for candidates; the embedded server has them.
    assert can.candidates == (None if server.real else "rows")


async def test_the_probe_measures_the_server_under_load(server: Endpoint):
    report = await probe(server.url, api_key=server.api_key, load=True, load_tokens=192, batch=16)
    load = report.load
    assert load is not None
    assert (load.prompt_tokens, load.k, load.batch) == (192, 20, 16)
    assert [level.concurrency for level in load.levels[:3]] == [1, 2, 4]
    assert sum(level.failed for level in load.levels) == 0
    assert all(0 < level.p50_s <= level.p95_s for level in load.levels)
    assert all(level.requests >= max(8, 2 * level.concurrency) for level in load.levels)
    assert load.tokens_per_s == max(level.tokens_per_s for level in load.levels)
    assert load.steps_per_hour == pytest.approx(3600 * load.tokens_per_s / (16 * 192))
    # A flag is only advised to a server that has it.
    assert any("V2_MODEL_RUNNER" in line for line in report.advice) == server.real


async def test_the_probe_never_shows_the_key(embedded: Endpoint):
    report = await probe(embedded.url, api_key=API_KEY)
    assert API_KEY not in str(report.as_json())


@pytest.mark.parametrize("student", ["other"])
async def test_a_student_with_another_tokenizer_is_noticed(embedded: Endpoint, student: str, tmp_path):
    from tests.fakes.tinymodels import make_tiny_model

    other = make_tiny_model(tmp_path / student, vocab=1024)
    report = await probe(embedded.url, api_key=API_KEY, student=load_student_byte_map(other))
    assert report["tokenizer"].status in {"warn", "fail"}, report["tokenizer"]
