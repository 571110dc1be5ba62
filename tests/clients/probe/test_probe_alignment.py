"""The alignment self-test on recorded replies that are off by one, and on honest ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.probing import probed
from topkd.clients.config import ClientConfig
from topkd.clients.probe.openai import check_echo_alignment
from topkd.clients.probe.scores import check_alignment
from topkd.topk.types import TopK

GOLDEN = Path(__file__).parents[2] / "golden" / "llama-cpp"


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
    test = check_echo_alignment(drawn, _choice("lcp_b1b_echo_mt0"))
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
    test = check_echo_alignment(drawn, honest)
    assert test is not None
    assert test.aligned
    assert check_echo_alignment(_drawn([]), honest) is None
    assert check_echo_alignment({"logprobs": None}, honest) is None
    assert check_echo_alignment(drawn, {"logprobs": {"tokens": ["c", "d"], "token_logprobs": [-0.7, -0.2]}}) is None


def test_alignment_tells_a_shift_from_noise_and_from_nothing():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 30))
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    tokens = rng.integers(0, 30, 12).astype(np.int32)
    drawn = rows[np.arange(12), tokens].astype(np.float32)

    def scores(table: np.ndarray) -> TopK:
        lists = [list(enumerate(row)) for row in table]
        return TopK.from_lists(lists, actual_ids=tokens, actual_logp=table[np.arange(12), tokens].astype(np.float32))

    assert check_alignment(scores(rows), tokens, drawn).aligned
    assert check_alignment(scores(rows - 0.02), tokens, drawn).worst == pytest.approx(0.02, abs=1e-6)
    assert check_alignment(scores(np.roll(rows, -1, axis=0)), tokens, drawn).shift == 1
    assert check_alignment(scores(np.roll(rows, 1, axis=0)), tokens, drawn).shift == -1
    assert check_alignment(scores(rows[rng.permutation(12)]), tokens, drawn).shift is None
    assert check_alignment(scores(rows), tokens[:0], drawn[:0]).shift is None
