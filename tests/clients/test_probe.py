"""``probe``: what an endpoint says is checked against what it does; a toy server tells one lie at a time."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.vllm_toy import VllmToy
from topkd.clients.bytemap import ByteMap, load_bytemap
from topkd.clients.config import ClientConfig
from topkd.clients.probe import CONFIG, probe
from topkd.clients.probe_alignment import alignment
from topkd.clients.probe_dialect import open_client
from topkd.clients.probe_findings import ProbeReport
from topkd.clients.probe_openai import echo_alignment
from topkd.topk.errors import AuthError, ConfigError, ModelNotFoundError, ServerUnreachableError
from topkd.topk.types import TopK

GOLDEN = Path(__file__).parents[1] / "golden" / "llama-cpp"


@contextmanager
def served(handler: Any) -> Iterator[str]:
    """``handler`` behind real HTTP on loopback."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet a reply: the kernel delays the second of two small ones by 40 ms

        def answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, value = handler(self.command, self.path, json.loads(raw) if raw else None)
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def probed(handler: Any, **options: Any) -> ProbeReport:
    with served(handler) as url:
        return await probe(url, **options)


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


async def test_load_finds_the_concurrency_from_which_more_is_no_help():
    lock = threading.Semaphore(2)
    toy = VllmToy(generate=False)

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if body and len(body.get("prompt", ())) == 64:
            with lock:
                threading.Event().wait(0.12)
                return toy(method, path, body)
        return toy(method, path, body)

    report = await probed(handler, load=True, load_tokens=64, batch=10)
    assert report.load is not None
    assert report.load.saturated
    assert report.load.best > 1, report.load
    assert report.load.tokens_per_s < 1.2 * 2 * 64 / 0.12, "two at a time is all that it does"
    assert [level.concurrency for level in report.load.levels][:2] == [1, 2]
    assert report.load.steps_per_hour == pytest.approx(3600 * report.load.tokens_per_s / 640)
    assert all(level.failed == 0 for level in report.load.levels)


@pytest.fixture(autouse=True)
def _no_reports_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


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


def _choice(name: str) -> dict[str, Any]:
    return dict(json.loads((GOLDEN / f"{name}.json").read_text())["response"]["body"]["choices"][0])


def _drawn(content: list[dict[str, Any]]) -> dict[str, Any]:
    """llama.cpp's chat-style draw in the legacy form of the echo."""
    return {
        "logprobs": {
            "tokens": [position["token"] for position in content],
            "token_logprobs": [position["logprob"] for position in content],
            "top_logprobs": None,
        }
    }


def test_the_off_by_one_of_a_recorded_llama_cpp_python_echo_is_caught():
    """Its echo puts the distribution *after* a token into that token's row. The draw is the same model's own."""
    drawn = _drawn([{"token": "tri", "logprob": -1.5375}])  # ll_b1: the most probable token, drawn at temperature 0
    test = echo_alignment(drawn, _choice("lcp_b1b_echo_mt0"))
    assert test is not None
    assert (test.aligned, test.shift) == (False, 1)
    assert test.worst > 15


async def test_a_server_with_that_echo_is_refused_with_the_reason():
    echoed = _choice("lcp_b1b_echo_mt0")
    text = "".join(echoed["logprobs"]["tokens"][:17])

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "teacher"}]}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if not isinstance(body["prompt"], str):
            return 500, {"error": {"message": "18 validation errors: Input should be a valid string"}}
        assert body["prompt"].startswith(text)
        logprobs = {"tokens": ["tri"], "token_logprobs": [-1.5375], "top_logprobs": [{"tri": -1.5375}]}
        return 200, {"choices": [echoed if body.get("echo") else {"text": "tri", "logprobs": logprobs}]}

    report = await probed(handler, config=ClientConfig(max_retries=0))
    assert not report.can_teach
    assert report["echo"].status == "fail"
    assert "off by one" in report["echo"].detail


def test_an_honest_echo_passes_and_none_is_none():
    names = ["a", "b", "c", "d"]
    lists = [None, {"b": -0.5, "x": -1.0}, {"c": -0.7, "y": -0.8}, {"d": -0.2, "z": -3.0}]
    honest = {"logprobs": {"tokens": names, "token_logprobs": [None, -0.5, -0.7, -0.2], "top_logprobs": lists}}
    drawn = _drawn([{"token": "c", "logprob": -0.7}, {"token": "d", "logprob": -0.2}])
    test = echo_alignment(drawn, honest)
    assert test is not None
    assert test.aligned
    assert echo_alignment(_drawn([]), honest) is None
    assert echo_alignment({"logprobs": None}, honest) is None
    assert echo_alignment(drawn, {"logprobs": {"tokens": ["c", "d"], "token_logprobs": [-0.7, -0.2]}}) is None


def test_alignment_tells_a_shift_from_noise_and_from_nothing():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 30))
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    tokens = rng.integers(0, 30, 12).astype(np.int32)
    drawn = rows[np.arange(12), tokens].astype(np.float32)

    def scores(table: np.ndarray) -> TopK:
        lists = [list(enumerate(row)) for row in table]
        return TopK.from_lists(lists, actual_ids=tokens, actual_logp=table[np.arange(12), tokens].astype(np.float32))

    assert alignment(scores(rows), tokens, drawn).aligned
    assert alignment(scores(rows - 0.02), tokens, drawn).worst == pytest.approx(0.02, abs=1e-6)
    assert alignment(scores(np.roll(rows, -1, axis=0)), tokens, drawn).shift == 1
    assert alignment(scores(np.roll(rows, 1, axis=0)), tokens, drawn).shift == -1
    assert alignment(scores(rows[rng.permutation(12)]), tokens, drawn).shift is None
    assert alignment(scores(rows), tokens[:0], drawn[:0]).shift is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fakes.tinymodels import make_tiny_model

    folder = tmp_path_factory.mktemp("probe") / "model"
    make_tiny_model(folder, seed=1, std=0.25)
    return folder


@pytest.fixture(scope="module")
def embedded(model: Path) -> Iterator[str]:
    from topkd.serve import ServeConfig, ServerProcess

    with ServerProcess(ServeConfig(model=str(model), served_model_name="t", port=0, max_model_len=512)) as up:
        yield up.url


async def test_the_embedded_server_can_teach_its_own_student(embedded: str, model: Path):
    report = await probe(embedded, student=load_bytemap(model))
    assert report.verdict.startswith("can teach: K <= 20; scores candidates (rows)")
    assert not [finding for finding in report.findings if finding.status == "fail"]
    has = report.capabilities
    assert (has.score_k, has.vocab_size, has.max_model_len, has.candidates) == (20, 2048, 512, "rows")
    assert {"lora", "reload", "pause"} <= set(has.sync)


def _command(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": str(columns), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-m", "topkd", "probe", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )


async def test_the_command_prints_a_table_of_80_columns_and_the_verdict_last(embedded: str, model: Path):
    done = await asyncio.to_thread(_command, embedded, "--student", str(model))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.rstrip().splitlines()
    assert lines[-1].startswith("can teach: K <= 20")
    assert max(len(line) for line in lines[:-1]) <= 80
    assert any("alignment self-test" in line for line in lines)


async def test_the_command_says_the_same_as_json_and_exits_with_the_verdict():
    with served(VllmToy()) as url:
        done = await asyncio.to_thread(_command, url, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["can_teach"] is True
    assert told["capabilities"]["score_k"] == 20
    assert {finding["key"] for finding in told["findings"]} >= {"k_max", "alignment", "candidates", "sync"}
    with served(VllmToy(shift=1)) as url:
        done = await asyncio.to_thread(_command, url)
    assert done.returncode == 1
    assert done.stdout.rstrip().splitlines()[-1].startswith("cannot teach: its rows are off by one")


@pytest.mark.parametrize("arguments", [("nonsense",), ("http://127.0.0.1:9", "--student", "/nowhere/at/all")])
def test_a_question_that_cannot_be_right_is_one_line_and_exit_code_2(arguments: tuple[str, ...]):
    done = _command(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("topkd: error:")


@pytest.mark.vllm
@pytest.mark.slow
async def test_a_real_vllm_can_teach_and_both_dialects_say_the_same(model: Path, tmp_path: Path):
    from tests.contract.conftest import need_vllm
    from tests.contract.servers import vllm_server
    from topkd.clients.vllm import VllmCompletions
    from topkd.clients.vllm_generate import VllmGenerate
    from topkd.topk.samples import SamplingParams

    need_vllm()
    options = {"model": "t", "log": tmp_path / "vllm.log", "max_logprobs": 32, "max_model_len": 512}
    with vllm_server(model, **options, lora=True) as up:
        report = await probe(up.url, student=load_bytemap(model))
        assert report.verdict.startswith("can teach: K <= 32"), report.verdict
        has = report.capabilities
        assert (report.dialect, has.vocab_size, has.max_model_len) == ("vllm_generate", 2048, 512)
        assert (has.sample_temp, has.score_temp, has.version) == ("raw", "none", "0.32.0")
        assert {"lora", "reload", "pause"} <= set(has.sync)
        assert report["tokenizer"].status in {"ok", "warn"}, "the ids are the student's own"
        assert report["speculative"].status == "ok"
        ids = np.random.default_rng(4).integers(8, 2048, 60)
        async with VllmCompletions(up.url) as one, VllmGenerate(up.url) as other:
            for start, k in ((0, 20), (33, 32)):
                assert await one.score(ids, start, k) == await other.score(ids, start, k)
            params = SamplingParams(12, seed=5)
            [left], [right] = await one.sample(ids, 1, params, k=7), await other.sample(ids, 1, params, k=7)
        np.testing.assert_array_equal(left.completion_ids, right.completion_ids)
        np.testing.assert_allclose(left.logp, right.logp, atol=2e-5)
        np.testing.assert_array_equal(left.topk.ids, right.topk.ids)
        assert left.topk.k == right.topk.k == 7


@pytest.mark.vllm
@pytest.mark.slow
async def test_a_real_llama_cpp_cannot_teach_and_the_verdict_says_why(model: Path, tmp_path: Path):
    from tests.contract.servers import LLAMA_PYTHON, ROOT, free_port, running

    if not LLAMA_PYTHON.exists():
        pytest.fail(f"no llama.cpp at {LLAMA_PYTHON}: run `bash scripts/setup_llama.sh`", pytrace=False)
    gguf, port = tmp_path / "model.gguf", free_port()
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    contract = ROOT / "tests" / "contract"
    convert = [str(LLAMA_PYTHON), str(contract / "gguf_model.py"), str(model), str(gguf)]
    await asyncio.to_thread(subprocess.run, convert, check=True, env=environment, capture_output=True, timeout=60)
    command = [str(LLAMA_PYTHON), str(contract / "llama_serve.py"), str(gguf), str(port)]
    url = f"http://127.0.0.1:{port}"
    with running(command, env=environment, log=tmp_path / "llama.log", ready=f"{url}/health", timeout_s=60):
        report = await probe(url, student=load_bytemap(model))
        done = await asyncio.to_thread(_command, url)
    assert report.dialect == "openai"
    assert report.verdict.startswith("cannot teach: it answers 200 to prompt_logprobs but leaves the scores out")
    assert (report.capabilities.score_k, report.capabilities.sample_k) == (None, 20)
    assert done.returncode == 1
    assert done.stdout.rstrip().splitlines()[-1] == report.verdict
