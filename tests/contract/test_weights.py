"""Weights: pause, reload, version, cache reset, resume; and no stale cache behind a correct-looking score."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.contract.conftest import Models
from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint
from tests.contract.wire import SCORE, complete, generate, get, is_at_least, post, token_ids, until_busy
from tests.faults.server import PAUSED

TOLERANCE = 1e-4


def _reload(server: Endpoint, folder: Path, version: str) -> None:
    """The order a sink must keep: pause, reload, cache reset, version, resume in any case."""
    assert post(server, "/pause?mode=wait", None).json() == {"status": "paused"}
    try:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        reply = post(server, "/collective_rpc", body)
        assert reply.status_code == 200, reply.text
        assert reply.json() == {"results": [None]}
        assert post(server, "/reset_prefix_cache", None).json() == {"success": True}
        reply = post(server, "/update_weight_version", {"new_version": version})
        assert reply.json() == {"success": True, "new_version": version}
    finally:
        assert post(server, "/resume", None).json() == {"status": "resumed"}


def _generation_error(server: Endpoint, folder: Path, prompt: list[int]) -> float:
    """Largest error of *generated* logprobs: prompt logprobs bypass the prefix cache and would hide a stale one."""
    [choice] = complete(server, prompt, max_tokens=4, temperature=0, logprobs=0, return_token_ids=True, ignore_eos=True)
    exact = logp_rows(folder, prompt + choice["token_ids"])[len(prompt) - 1 :]
    pairs = zip(exact, choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=False)
    return max(abs(row[token] - logp) for row, token, logp in pairs)


def test_a_reload_changes_scores_and_generation_and_its_version_is_confirmed(
    server: Endpoint, models: Models, cleanup: Callable
):
    cleanup(_reload, server, models.policy, "default")
    prompt = token_ids(200, seed=80)  # long enough to fill cache blocks
    for _ in range(2):
        assert _generation_error(server, models.policy, prompt) < TOLERANCE
    _reload(server, models.updated, "step-7")
    assert get(server, "/weight_info").json() == {"weight_version": "step-7"}
    assert _generation_error(server, models.updated, prompt) < TOLERANCE
    assert _generation_error(server, models.policy, prompt) > 0.1, "the two checkpoints must differ"
    exact = logp_rows(models.updated, prompt)
    rows = complete(server, prompt, prompt_logprobs=0, **SCORE)[0]["prompt_logprobs"]
    for position, row in enumerate(rows[1:], start=1):
        [entry] = row.values()
        assert entry["logprob"] == pytest.approx(exact[position - 1, prompt[position]], abs=TOLERANCE)
    [choice] = generate(server, prompt[:5], max_tokens=3, ignore_eos=True)["choices"]
    assert choice["weight_versions"] == [{"version": "step-7", "start": 0, "end": 3}]


def test_a_reload_alone_does_not_bump_the_version(server: Endpoint, models: Models, cleanup: Callable):
    cleanup(_reload, server, models.policy, "default")
    before = get(server, "/weight_info").json()
    post(server, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(models.updated)}})
    assert get(server, "/weight_info").json() == before


def test_requests_sent_while_paused_wait_until_resume(server: Endpoint, cleanup: Callable):
    cleanup(post, server, "/resume", None)
    assert post(server, "/pause?mode=keep", None).json() == {"status": "paused"}
    assert get(server, "/is_paused").json() == {"is_paused": True}
    with pytest.raises(httpx.ReadTimeout):
        post(
            server,
            "/v1/completions",
            {"model": server.model, "prompt": [9, 10], "max_tokens": 1},
            timeout=httpx.Timeout(240, read=1.0),
        )
    done = threading.Event()

    def ask() -> None:
        complete(server, [9, 10], max_tokens=1)
        done.set()

    waiting = threading.Thread(target=ask)
    waiting.start()
    assert not done.wait(0.5)
    post(server, "/resume", None)
    assert done.wait(240)
    waiting.join()
    assert get(server, "/is_paused").json() == {"is_paused": False}


@pytest.mark.vllm
@pytest.mark.slow
def test_a_pause_for_new_weights_rejects_new_requests_since_033(vllm: Endpoint, cleanup: Callable):
    cleanup(post, vllm, "/resume", None)
    assert post(vllm, "/pause?mode=wait", None).json() == {"status": "paused"}
    body = {"model": vllm.model, "prompt": [9, 10], "max_tokens": 1}
    if is_at_least(vllm, 33):
        reply = post(vllm, "/v1/completions", body)
        assert (reply.status_code, reply.json()) == (503, PAUSED)
        assert "retry-after" not in reply.headers
    else:
        with pytest.raises(httpx.ReadTimeout):
            post(vllm, "/v1/completions", body, timeout=httpx.Timeout(240, read=1.0))


def test_pause_abort_ends_what_is_in_flight_as_a_200_marked_abort(server: Endpoint, cleanup: Callable):
    cleanup(post, server, "/resume", None)
    replies: list[dict] = []

    def ask() -> None:
        replies.extend(
            complete(server, [9, 10], n=16, max_tokens=1000, temperature=1.0, ignore_eos=True, return_token_ids=True)
        )

    running = threading.Thread(target=ask)
    running.start()
    until_busy(server)  # 16,000 tokens take far longer than the request that ends them
    post(server, "/pause?mode=abort", None)
    running.join(240)
    assert len(replies) == 16
    assert {choice["finish_reason"] for choice in replies} == {"abort"}, "a 200 that is not a completion"
    assert all(len(choice["token_ids"]) < 1000 for choice in replies)


def test_an_unknown_pause_mode_is_refused_and_does_not_pause(server: Endpoint):
    assert post(server, "/pause?mode=never", None).status_code == 400
    assert get(server, "/is_paused").json() == {"is_paused": False}
    assert post(server, "/resume", None).status_code == 200, "resume without a pause is harmless"


def test_an_unknown_worker_method_is_a_500_that_names_it(server: Endpoint):
    reply = post(server, "/collective_rpc", {"method": "no_such_method"})
    assert reply.status_code == 500
    assert "no_such_method" in reply.json()["error"]["message"]
    complete(server, [9, 10], max_tokens=1)
