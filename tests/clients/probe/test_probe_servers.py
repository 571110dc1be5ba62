"""``topkd probe`` on running servers: the embedded one, a real vLLM, a real llama.cpp."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.clients.probing import served
from tests.clients.vllm_toy import VllmToy
from topkd.clients.probe.probe import probe
from topkd.compose.data.byte_maps import load_student_byte_map


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
    report = await probe(embedded, student=load_student_byte_map(model))
    assert report.verdict.startswith("can teach: K <= 20; scores candidates (rows)")
    assert not [finding for finding in report.findings if finding.status == "fail"]
    has = report.capabilities
    assert (has.score_k, has.vocab_size, has.max_model_len, has.candidates) == (20, 2048, 512, "rows")
    assert {"lora", "reload", "pause"} <= set(has.sync)


def test_a_tokenizer_is_compared_as_transformers_loads_it(model: Path, tmp_path: Path):
    """Its file and what transformers makes of it may cut a text in two ways; a server goes by the second."""
    from transformers import AutoTokenizer

    text = "def f(x):\n        return x + 1024"
    table = load_student_byte_map(model)
    loaded = AutoTokenizer.from_pretrained(model).encode(text, add_special_tokens=False)
    assert table.encode_as_loaded(text) == loaded
    alone = tmp_path / "tokenizer.json"
    alone.write_bytes((model / "tokenizer.json").read_bytes())
    assert load_student_byte_map(alone).encode_as_loaded(text) is None, "a file alone does not say what model it is of"


def _command(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": str(columns), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-m", "topkd", "probe", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
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
    from topkd.clients.dialects.vllm import VllmCompletions
    from topkd.clients.dialects.vllm_generate import VllmGenerate
    from topkd.topk.samples import SamplingParams

    need_vllm()
    options = {"model": "t", "log": tmp_path / "vllm.log", "max_logprobs": 32, "max_model_len": 512}
    with vllm_server(model, **options, lora=True) as up:
        report = await probe(up.url, student=load_student_byte_map(model))
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
    await asyncio.to_thread(subprocess.run, convert, check=True, env=environment, capture_output=True, timeout=240)
    command = [str(LLAMA_PYTHON), str(contract / "llama_serve.py"), str(gguf), str(port)]
    url = f"http://127.0.0.1:{port}"
    with running(command, env=environment, log=tmp_path / "llama.log", ready=f"{url}/health", timeout_s=240):
        report = await probe(url, student=load_student_byte_map(model))
        done = await asyncio.to_thread(_command, url)
    assert report.dialect == "openai"
    assert report.verdict.startswith("cannot teach: it answers 200 to prompt_logprobs but leaves the scores out")
    assert (report.capabilities.score_k, report.capabilities.sample_k) == (None, 20)
    assert done.returncode == 1
    assert done.stdout.rstrip().splitlines()[-1] == report.verdict
