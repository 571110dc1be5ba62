"""lm-eval and inspect-ai evaluate the model behind `topkd serve`."""

from __future__ import annotations

import pytest

from tests.clients_of_serve.conftest import API_KEY, Program
from tests.contract.servers import Endpoint

pytestmark = [pytest.mark.clients, pytest.mark.slow]


def test_lm_eval_finds_through_the_server_what_its_own_back_end_finds(open_server: Endpoint, run: Program):
    found = run("use_lm_eval", url=open_server.url, model=open_server.model, folder=str(open_server.model_dir))
    served, local = found["served"], found["local"]
    assert served["greedy"] == local["greedy"]
    assert any(text for [text] in served["greedy"])
    assert served["acc"] == local["acc"]
    for mine, own in zip(served["four_choices"], local["four_choices"], strict=True):
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in own]
        assert [logp for logp, _ in mine] == pytest.approx([logp for logp, _ in own], abs=2e-3)
        assert [logp for logp, _ in mine] == pytest.approx([logp for logp, _ in own], rel=1e-4)
    assert [row[0] for row in served["perplexity"]] == pytest.approx([row[0] for row in local["perplexity"]], rel=1e-4)


def test_inspect_evaluates_a_task(server: Endpoint, run: Program):
    found = run("use_inspect", url=server.url, key=API_KEY, model=server.model)
    assert (found["status"], found["error"]) == ("success", None)
    assert found["accuracy"] == 0.0
    assert found["usage"] == [24]
    with server.http() as http:
        for index, (text, logprobs) in enumerate(zip(found["outputs"], found["logprobs"], strict=True)):
            messages = [{"role": "user", "content": f"def method_{index}(self):"}]
            fields = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
            body = {"model": server.model, "messages": messages, **fields}
            [choice] = http.post("/v1/chat/completions", json=body).json()["choices"]
            assert text == choice["message"]["content"]
            own = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            assert logprobs == pytest.approx(own, abs=1e-4), "the three ran as one batch"
            assert found["reasons"][index] == "max_tokens"
