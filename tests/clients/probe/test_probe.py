"""``probe``: what an endpoint says is checked against what it does; a toy server tells one lie at a time."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.probing import probed, served
from tests.clients.vllm_toy import VllmToy
from topkd.clients.config import ClientConfig
from topkd.clients.connection import open_client
from topkd.clients.decoding.byte_map import ByteMap
from topkd.clients.probe import load as probe_load
from topkd.clients.probe.findings import LoadLevel, ProbeReport
from topkd.clients.probe.probe import CONFIG, probe
from topkd.topk.errors import AuthError, ConfigError, ModelNotFoundError, ServerUnreachableError


async def test_an_honest_server_can_teach_and_every_capability_is_what_it_has():
    report = await probed(VllmToy(limit=24))
    assert (report.can_teach, report.verdict) == (True, "can teach: K <= 24; scores candidates (rows)")
    assert {finding.status for finding in report.findings} <= {"ok", "info", "unknown"}
    has = report.capabilities
    assert (has.score_k, has.vocab_size, has.max_model_len, has.version) == (24, 120, 256, "0.32.0")
    assert (has.candidates, has.score_temp, has.sample_temp, has.suffix_scoring) == ("rows", "none", "raw", False)
    assert has.sync == ("lora", "pause")
    assert report.dialect == "vllm_generate"
    assert report.requests < 60


async def test_a_server_without_a_limit_teaches_any_k():
    report = await probed(VllmToy(limit=-1))
    assert report.verdict.startswith("can teach: any K")
    assert report.capabilities.vocab_size == 120


async def test_a_limit_below_the_default_k_is_a_warning_with_the_flag_to_change():
    report = await probed(VllmToy(limit=5))
    assert report.verdict.startswith("can teach: K <= 5")
    assert report["k_max"].status == "warn"
    assert any("--max-logprobs" in line for line in report.advice)


async def test_without_generate_the_dialect_is_completions_and_the_advice_says_what_is_missed():
    report = await probed(VllmToy(generate=False))
    assert (report.dialect, report.capabilities.candidates) == ("vllm", None)
    assert any("--enable-scale-out" in line for line in report.advice)
    assert report.can_teach


@pytest.mark.parametrize(
    ("lie", "key", "words"),
    [
        ({"shift": 1}, "alignment", "rows are off by one"),
        ({"shift": -1}, "alignment", "rows are off by one"),
        ({"shift": 3}, "alignment", "nats from the logprobs they were drawn with"),
        ({"noise": 0.5}, "alignment", "nats from the logprobs they were drawn with"),
        ({"scores": False}, "k_max", "no prompt_logprobs"),
        ({"scores_follow_temperature": True}, "score_temperature", "follow the sampling temperature"),
        ({"speculative": True}, "speculative", "speculative"),
        ({"limit": 0}, "k_max", "no list"),
    ],
)
async def test_every_lie_that_would_spoil_teaching_is_found_and_named(lie: dict[str, Any], key: str, words: str):
    report = await probed(VllmToy(**lie))
    assert report.verdict.startswith("cannot teach: ")
    assert words in report.verdict
    assert report[key].status == "fail"


async def test_a_systematic_hundredth_of_a_nat_is_a_warning_though_no_single_reply_shows_it():
    report = await probed(VllmToy(noise=0.01))
    assert report["alignment"].status == "warn"
    assert "0.01" in report["alignment"].value


@pytest.mark.parametrize("kind", ["raw", "temperature", "processed"])
async def test_what_sampled_logprobs_are_of_is_told_apart(kind: str):
    report = await probed(VllmToy(sampled=kind))
    assert report.capabilities.sample_temp == kind
    assert report["sample_temperature"].status == {"raw": "ok", "temperature": "info", "processed": "warn"}[kind]
    assert report["not_finite"].value == ("served" if kind == "processed" else "not provoked")


async def test_wrong_candidates_are_not_offered():
    report = await probed(VllmToy(candidate_noise=-1.0))
    assert report.capabilities.candidates is None
    assert report["candidates"].status == "warn"
    assert report.can_teach, "the teacher's own top K does not need them"


def _student(size: int = 120, *, wrong: int | None = None) -> ByteMap:
    class Decoder:
        def decode(self, ids: list[int], **_: Any) -> str:
            return chr(65 + ids[0] + (ids[0] == wrong))

        def id_to_token(self, token: int) -> str:
            return chr(65 + token + (token == wrong))

        def encode(self, text: str, **_: Any) -> Any:
            return type("Cut", (), {"ids": list(range(40))})()

    return ByteMap({t: chr(65 + t + (t == wrong)).encode() for t in range(size)}, frozenset(), Decoder())


async def test_another_tokenizer_than_the_students_cannot_teach_this_student():
    good = await _against(_student())
    assert good["tokenizer"].status == "ok"
    report = await _against(_student(wrong=17))
    assert report.verdict == "cannot teach: its tokens are not the student's: id 17 is 'R' there and 'S' here"


async def test_padding_of_the_vocabulary_is_counted():
    report = await _against(_student(112))
    assert report["padding"].value == "8"


async def _against(student: ByteMap) -> ProbeReport:
    toy = VllmToy()
    prompt = np.arange(52)

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/tokenize" and method == "POST":
            return 200, {"tokens": prompt.tolist()}
        return toy(method, path, body)

    student.tokenizer.encode = lambda text, **_: type("Cut", (), {"ids": prompt.tolist()})()
    return await probed(handler, student=student)


@pytest.mark.parametrize(
    ("rates", "best", "saturated"),
    [
        ([100, 190, 380, 390, 385], 8, True),  # doubling twice gained nothing
        ([100, 190, 120, 380, 400, 390], 16, True),  # one disturbed level does not end it
        ([100, 101, 99], 2, True),
        ([100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600], 256, False),
    ],
)
async def test_load_finds_the_concurrency_from_which_more_is_no_help(
    rates: list[int], best: int, saturated: bool, monkeypatch: pytest.MonkeyPatch
):
    left = iter(rates)

    async def level(_: Any, concurrency: int, length: int, k: int) -> LoadLevel:
        return LoadLevel(concurrency, 8, 0, float(next(left)), 0.01, 0.01)

    monkeypatch.setattr(probe_load, "_level", level)
    report = await probed(VllmToy(generate=False), load=True, load_tokens=64, batch=10)
    assert report.load is not None
    assert (report.load.best, report.load.saturated) == (best, saturated)
    assert [one.tokens_per_s for one in report.load.levels] == rates, (
        "no level is left out, none is asked after the end"
    )
    assert report.load.tokens_per_s == max(rates)
    assert report.load.steps_per_hour == pytest.approx(3600 * max(rates) / 640)


async def test_each_level_of_load_has_so_many_requests_in_flight_and_no_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe_load, "_ENOUGH_S", 0.0)
    monkeypatch.setattr(probe_load, "_LEVELS", (1, 2, 4))
    toy, lock, inside, most = VllmToy(generate=False), threading.Lock(), [0], list[int]()
    together = [threading.Barrier(n) for n in (1, 2, 4)]  # a request waits for the level's others

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if not (body and len(body.get("prompt", ())) == 64):
            return toy(method, path, body)
        with lock:
            inside[0] += 1
            most.append(inside[0])
            barrier = together[(len(most) - 1) // 8]
        try:
            barrier.wait(30)
            return toy(method, path, body)
        finally:
            with lock:
                inside[0] -= 1

    report = await probed(handler, load=True, load_tokens=64, batch=10)
    assert report.load is not None
    assert [(level.concurrency, level.requests, level.failed) for level in report.load.levels] == [
        (1, 8, 0), (2, 8, 0), (4, 8, 0)
    ]  # fmt: skip
    assert [max(most[i : i + 8]) for i in (0, 8, 16)] == [1, 2, 4]


async def test_a_kept_report_is_used_while_the_server_says_the_same_and_never_unasked():
    toy = VllmToy()
    asked: list[str] = []

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        asked.append(path)
        return toy(method, path, body)

    with served(handler) as url:
        first = await probe(url, api_key="sk-secret-0123")
        asked.clear()
        again = await probe(url, cached=True)
        assert again == first
        assert "/v1/completions" not in asked, "only what the server says of itself is asked"
        assert (await probe(url)).requests > 30, "without cached=True everything is asked anew"
        toy.context = 128
        assert (await probe(url, cached=True)).capabilities.max_model_len == 128
        toy.context, toy.limit = 256, 5
        assert (await probe(url, cached=True, student=_student())).capabilities.score_k == 5, "another question"
    for file in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"):
        assert "sk-secret" not in file.read_text()
        file.write_text("{")
    with served(handler) as url:
        assert (await probe(url, cached=True)).capabilities.score_k == 5


async def test_what_makes_the_question_itself_wrong_is_one_typed_error():
    with served(VllmToy()) as url:
        with pytest.raises(ModelNotFoundError, match="nobody"):
            await probe(url, model="nobody")
        with pytest.raises(ConfigError, match="dialect"):
            await probe(url, dialect="latin")
        with pytest.raises(ConfigError, match="tokenizer"):
            await probe(url, student="/nowhere/at/all")
    with pytest.raises(ServerUnreachableError):
        await probe(url, config=ClientConfig(max_retries=0))
    with served(lambda *_: (401, {"error": "Unauthorized"})) as url, pytest.raises(AuthError):
        await probe(url)


async def test_a_server_that_fails_one_question_still_gets_the_others_answered():
    toy = VllmToy()

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if (
            path == "/inference/v1/generate"
            and method == "POST"
            and "prompt_logprob_token_ids" in body["sampling_params"]
        ):
            return 500, {"error": {"message": "kernel missing"}}
        return toy(method, path, body)

    report = await probed(handler, config=CONFIG.model_copy(update={"max_retries": 0}))
    assert report.can_teach
    assert "kernel missing" in report["candidates"].detail
    assert report["alignment"].status == "ok"


async def test_auto_opens_the_dialect_that_is_served():
    with served(VllmToy()) as url:
        async with await open_client(url) as client:
            assert client.dialect == "vllm_generate"
    with served(VllmToy(generate=False)) as url:
        async with await open_client(url) as client:
            assert client.dialect == "vllm"
        async with await open_client(url, dialect="sglang") as client:
            assert client.dialect == "sglang"

    def sglang(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "t"}]}
        return (200, {"version": "0.5.23", "tokenizer_path": "m"}) if path == "/server_info" else (404, {})

    with served(sglang) as url:
        async with await open_client(url) as client:
            assert client.dialect == "sglang"

    def plain(method: str, path: str, body: Any) -> tuple[int, Any]:
        return (200, {"data": [{"id": "t"}]}) if path == "/v1/models" else (404, {})

    with served(plain) as url:
        async with await open_client(url) as client:
            assert client.dialect == "openai"
