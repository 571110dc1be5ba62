"""A second real engine, llama.cpp: it samples exact top-K, and cannot score a prompt though it answers 200."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.contract.conftest import Models
from tests.contract.reference import logp_rows
from tests.contract.servers import LLAMA_PYTHON, Endpoint, free_port, running
from tests.contract.wire import complete, get, post, token_ids
from topkd.clients import ClientConfig, VllmCompletions
from topkd.clients.probe.probe import probe
from topkd.topk.errors import ResponseError, UnsupportedError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

HERE = Path(__file__).parent
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llama(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    if not LLAMA_PYTHON.exists():
        pytest.fail(f"no llama.cpp at {LLAMA_PYTHON}: run `bash scripts/setup_llama.sh`", pytrace=False)
    folder = tmp_path_factory.mktemp("llama")
    model, log, port = folder / "model.gguf", folder / "server.log", free_port()
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    subprocess.run(
        [str(LLAMA_PYTHON), str(HERE / "gguf_model.py"), str(models.policy), str(model)],
        check=True,
        env=env,
        capture_output=True,
        timeout=240,
    )
    url = f"http://127.0.0.1:{port}"
    command = [str(LLAMA_PYTHON), str(HERE / "llama_serve.py"), str(model), str(port)]
    with running(command, env=env, log=log, ready=f"{url}/health", timeout_s=600) as up:
        yield Endpoint("llama.cpp", url, "t", models.policy, -1, 1024, up.popen.pid, log)


@pytest.fixture(scope="module")
def readable(models: Models) -> list[int]:
    """A prompt whose greedy continuation is whole characters: a token that ends inside one has no entry here."""
    tokenizer = AutoTokenizer.from_pretrained(models.policy)
    for seed in range(400, 500):
        ids = prompt = token_ids(17, seed=seed)
        for _ in range(6):
            ids = [*ids, int(logp_rows(models.policy, ids)[-1].argmax())]
        if all("�" not in tokenizer.decode([token]) for token in ids[len(prompt) :]):
            return prompt
    raise AssertionError("no prompt of a hundred has a readable continuation")


def test_native_sampling_gives_ids_with_exact_raw_logprobs_but_not_for_every_token(llama: Endpoint):
    k = 5
    tokenizer = AutoTokenizer.from_pretrained(llama.model_dir)
    fields = {"prompt": token_ids(17, seed=400), "n_predict": 40, "temperature": 0.9, "top_k": 0, "seed": 3}
    body = post(llama, "/completion", {**fields, "n_probs": k, "cache_prompt": False, "return_tokens": True}).json()
    exact = logp_rows(llama.model_dir, fields["prompt"] + body["tokens"])[len(fields["prompt"]) - 1 :]
    entries = iter(body["completion_probabilities"])
    entry, dropped = next(entries), []
    for row, token in zip(exact, body["tokens"], strict=False):
        if entry is None or entry["id"] != token:
            dropped.append(token)
            continue
        listed = {top["id"]: top["logprob"] for top in entry["top_logprobs"]}
        assert set(listed) == set(np.argsort(-row)[:k].tolist())
        for candidate, logp in {**listed, token: entry["logprob"]}.items():
            assert logp == pytest.approx(row[candidate], abs=TOLERANCE)
        entry = next(entries, None)
    assert entry is None, "every entry belongs to a token, in order"
    assert dropped, "the draw must show the gap"
    assert all("�" in tokenizer.decode([token]) for token in dropped), "only tokens that end inside a character"


def test_the_openai_route_lists_ids_too(llama: Endpoint, readable: list[int]):
    [choice] = complete(llama, readable, max_tokens=6, temperature=0, logprobs=3)
    content = choice["logprobs"]["content"]
    drawn = [entry["id"] for entry in content]
    exact = logp_rows(llama.model_dir, readable + drawn)[len(readable) - 1 :]
    assert drawn == exact.argmax(axis=1)[:-1].tolist()
    for row, entry in zip(exact, content, strict=False):
        for top in entry["top_logprobs"]:
            assert top["logprob"] == pytest.approx(row[top["id"]], abs=TOLERANCE)


def test_prompt_logprobs_are_ignored_with_a_200(llama: Endpoint, readable: list[int]):
    """The reason a 200 proves nothing: the request is accepted and the scores are simply not there."""
    [choice] = complete(llama, readable, max_tokens=1, temperature=0, logprobs=3, prompt_logprobs=3, echo=True)
    assert "prompt_logprobs" not in choice
    assert len(choice["logprobs"]["content"]) == 1, "echo is ignored too"


def test_it_is_not_a_vllm_and_refuses_a_prompt_past_its_context(llama: Endpoint):
    assert get(llama, "/version").status_code == 404
    assert post(llama, "/inference/v1/generate", {"token_ids": token_ids(5)}).status_code == 404
    error = post(llama, "/v1/completions", {"model": "t", "prompt": token_ids(1100), "max_tokens": 1}).json()["error"]
    assert "exceeds the available context size" in error["message"]


async def test_our_client_says_it_cannot_teach_instead_of_returning_rows(llama: Endpoint, readable: list[int]):
    async with VllmCompletions(llama.url, model="t", config=ClientConfig(max_retries=1, backoff_s=0.05)) as up:
        with pytest.raises((ResponseError, UnsupportedError), match="prompt_logprobs"):
            await up.score(readable, 0, 3)


async def test_the_probe_says_it_cannot_teach(llama: Endpoint):
    report = await probe(llama.url)
    assert not report.can_teach
    assert "cannot teach" in report.verdict
    assert report.capabilities.score_k is None
