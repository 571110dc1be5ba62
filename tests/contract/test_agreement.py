"""The embedded server against the real one: the same request, the same reply, key by key and value by value.

Both serve the same weights, so a deterministic request must give the same tokens, the same lists and logprobs within
float32 noise. What may differ is named below, each with its reason. One difference is deliberate and has no case:
after a prompt that ends inside a character vLLM's text repeats the prompt; ours holds what was drawn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contract.servers import Endpoint
from tests.contract.wire import array, is_at_least, token_ids

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

IDS = token_ids(17, seed=200)
CHAT = {"messages": [{"role": "user", "content": "import os\n"}]}
GREEDY = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
TOLERANCE = 2e-4  # two float32 engines, each within 1e-4 of float64

# How vLLM 0.33 answers otherwise than 0.32, whose replies the embedded server writes.
SINCE_033 = re.compile(
    r"\.choices\.\d+\.weight_versions: missing \(real: 'None'\)"
    r"|\.error\.message: '(You must pass at least one prompt)' instead of '\1 \(parameter=prompt\)'"
    r"|\.error\.param: None instead of 'prompt'"
)

# Keys whose values name a moment, a machine or a build.
FREE = {
    "id": "random per request",
    "request_id": "random per request",
    "created": "the time of the request",
    "system_fingerprint": "names the build",
    "version": "names the build",
    "owned_by": "names the server",
    "prompt_tokens_details": "counts hits of the real server's prefix cache",
}


def _sample(**fields: Any) -> dict[str, Any]:
    return {"prompt": IDS, **GREEDY, **fields}


def _generate(**sampling: Any) -> dict[str, Any]:
    return {"token_ids": IDS, "sampling_params": {"max_tokens": 1, "temperature": 0, **sampling}}


def _score(**fields: Any) -> dict[str, Any]:
    return {"prompt": IDS, "max_tokens": 1, "temperature": 0, **fields}


CASES: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "score": ("POST", "/v1/completions", _score(prompt_logprobs=5)),
    "score with ids": ("POST", "/v1/completions", _score(prompt_logprobs=5, return_token_ids=True)),
    "score realised only": ("POST", "/v1/completions", _score(prompt_logprobs=0)),
    "score batch": ("POST", "/v1/completions", _score(prompt=[IDS, IDS[:2]], prompt_logprobs=2)),
    "score one token": ("POST", "/v1/completions", _score(prompt=IDS[:1], prompt_logprobs=2)),
    "score twice by n": ("POST", "/v1/completions", _score(n=2, temperature=1, seed=1, top_k=1, prompt_logprobs=1)),
    "score and sample": ("POST", "/v1/completions", _sample(prompt_logprobs=2, logprobs=2)),
    "score text": ("POST", "/v1/completions", _score(prompt="import os", prompt_logprobs=2, return_token_ids=True)),
    "sample": ("POST", "/v1/completions", _sample()),
    "sample logprobs 0": ("POST", "/v1/completions", _sample(logprobs=0)),
    "sample logprobs": ("POST", "/v1/completions", _sample(logprobs=3)),
    "sample ids as strings": ("POST", "/v1/completions", _sample(logprobs=3, return_tokens_as_token_ids=True)),
    "sample ids": ("POST", "/v1/completions", _sample(logprobs=1, return_token_ids=True)),
    "sample stop id": ("POST", "/v1/completions", _sample(stop_token_ids=list(range(3, 2048)), return_token_ids=True)),
    "echo 0": ("POST", "/v1/completions", _sample(echo=True, max_tokens=0, logprobs=2)),
    "echo 0 ids": (
        "POST",
        "/v1/completions",
        _sample(echo=True, max_tokens=0, logprobs=2, return_tokens_as_token_ids=True),
    ),
    "echo 1": ("POST", "/v1/completions", _sample(echo=True, max_tokens=1, logprobs=2)),
    "echo no logprobs": ("POST", "/v1/completions", _sample(echo=True, max_tokens=1)),
    "clipped": ("POST", "/v1/completions", _sample(prompt=token_ids(1021), max_tokens=9, return_token_ids=True)),
    "no model": ("POST", "/v1/completions", {"model": None, "prompt": IDS, **GREEDY}),
    "chat": ("POST", "/v1/chat/completions", {**CHAT, **GREEDY}),
    "chat logprobs": ("POST", "/v1/chat/completions", {**CHAT, **GREEDY, "logprobs": True, "top_logprobs": 3}),
    "chat logprobs 0": ("POST", "/v1/chat/completions", {**CHAT, **GREEDY, "logprobs": True}),
    "chat ids": ("POST", "/v1/chat/completions", {**CHAT, **GREEDY, "return_token_ids": True, "prompt_logprobs": 2}),
    "chat ids as strings": (
        "POST",
        "/v1/chat/completions",
        {**CHAT, **GREEDY, "logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True},
    ),
    "generate": ("POST", "/inference/v1/generate", _generate()),
    "generate score": ("POST", "/inference/v1/generate", _generate(prompt_logprobs=3)),
    "generate score quietly": ("POST", "/inference/v1/generate", _generate(prompt_logprobs=3, detokenize=False)),
    "generate sample": ("POST", "/inference/v1/generate", _generate(max_tokens=4, logprobs=2, ignore_eos=True)),
    "generate sample 0": ("POST", "/inference/v1/generate", _generate(max_tokens=4, logprobs=0, ignore_eos=True)),
    "tokenize": ("POST", "/tokenize", {"prompt": "import os\n"}),
    "tokenize chat": ("POST", "/tokenize", CHAT),
    "detokenize": ("POST", "/detokenize", {"tokens": [40, 50, 60]}),
    "version": ("GET", "/version", None),
    "health": ("GET", "/health", None),
    "weight info": ("GET", "/weight_info", None),
    "is paused": ("GET", "/is_paused", None),
    "reset prefix cache": ("POST", "/reset_prefix_cache", None),
    # Refusals: status and words.
    "K over": ("POST", "/v1/completions", _score(prompt_logprobs=65)),
    "K -1": ("POST", "/v1/completions", _score(prompt_logprobs=-1)),
    "K -2": ("POST", "/v1/completions", _score(prompt_logprobs=-2)),
    "sample K over": ("POST", "/v1/completions", _sample(logprobs=65)),
    "sample K -2": ("POST", "/v1/completions", _sample(logprobs=-2)),
    "chat K over": ("POST", "/v1/chat/completions", {**CHAT, **GREEDY, "logprobs": True, "top_logprobs": 65}),
    "chat top without logprobs": ("POST", "/v1/chat/completions", {**CHAT, **GREEDY, "top_logprobs": 2}),
    "generate K over": ("POST", "/inference/v1/generate", _generate(prompt_logprobs=65)),
    "generate start alone": ("POST", "/inference/v1/generate", _generate(prompt_logprob_start=3)),
    "prompt full": ("POST", "/v1/completions", _score(prompt=token_ids(1024))),
    "prompt over": ("POST", "/v1/completions", _score(prompt=token_ids(1025))),
    "chat over": ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x y " * 2000}], **GREEDY}),
    "generate full": ("POST", "/inference/v1/generate", {**_generate(), "token_ids": token_ids(1024)}),
    "generate over": ("POST", "/inference/v1/generate", {**_generate(), "token_ids": token_ids(1025)}),
    "unknown model": ("POST", "/v1/completions", _score(model="nobody")),
    "unknown model chat": ("POST", "/v1/chat/completions", {**CHAT, **GREEDY, "model": "nobody"}),
    "unknown model generate": ("POST", "/inference/v1/generate", {**_generate(), "model": "nobody"}),
    "id past vocab": ("POST", "/v1/completions", _score(prompt=[9, 2048])),
    "id past vocab generate": ("POST", "/inference/v1/generate", {**_generate(), "token_ids": [9, 2048]}),
    "id negative": ("POST", "/v1/completions", _score(prompt=[9, -1])),
    "prompt empty": ("POST", "/v1/completions", _score(prompt=[])),
    "prompt object": ("POST", "/v1/completions", _score(prompt={"a": 1})),
    "max_tokens text": ("POST", "/v1/completions", _score(max_tokens="x")),
    "max_tokens 0": ("POST", "/v1/completions", _score(max_tokens=0)),
    "temperature -1": ("POST", "/v1/completions", _score(temperature=-1)),
    "top_p 0": ("POST", "/v1/completions", _score(top_p=0)),
    "min_p 2": ("POST", "/v1/completions", _score(min_p=2)),
    "top_k -2": ("POST", "/v1/completions", _score(top_k=-2)),
    "n 0": ("POST", "/v1/completions", _score(n=0)),
    "repetition_penalty 0": ("POST", "/v1/completions", _score(repetition_penalty=0)),
    "stop ids text": ("POST", "/v1/completions", _score(stop_token_ids=["a"])),
    "stream scoring": ("POST", "/v1/completions", _score(stream=True, prompt_logprobs=1)),
    "batch with a bad prompt": ("POST", "/v1/completions", _score(prompt=[IDS, [9, 5000]])),
    "chat no messages": ("POST", "/v1/chat/completions", {**GREEDY}),
    "wrong path": ("POST", "/v1/nope", {"prompt": IDS}),
    "wrong method": ("GET", "/v1/completions", None),
    "pause mode": ("POST", "/pause?mode=never", None),
    "version missing": ("POST", "/update_weight_version", {}),
    "unknown rpc": ("POST", "/collective_rpc", {"method": "no_such_method"}),
    "adapter missing": ("POST", "/v1/load_lora_adapter", {"lora_name": "ghost", "lora_path": "/no/such/adapter"}),
    "adapter unknown": ("POST", "/v1/unload_lora_adapter", {"lora_name": "ghost"}),
    "adapter without path": ("POST", "/v1/load_lora_adapter", {"lora_name": "ghost"}),
}
CANDIDATES = {
    "all rows": {"prompt_logprob_token_ids": [[5, 9]] * 16},
    "start": {"prompt_logprob_token_ids": [[5], [7, 8], [-1], [2047]], "prompt_logprob_start": 12},
    "with top-k": {"prompt_logprob_token_ids": [[5, 9]] * 16, "prompt_logprobs": 2},
    "wrong rows": {"prompt_logprob_token_ids": [[5], [6]], "prompt_logprob_start": 12},
    "past vocab": {"prompt_logprob_token_ids": [[2048]] * 16},
    "too wide": {"prompt_logprob_token_ids": [list(range(65))] * 16},
    "empty": {"prompt_logprob_token_ids": []},
    "empty rows": {"prompt_logprob_token_ids": [[]] * 16},
    "flat": {"prompt_logprob_token_ids": [5, 9]},
    "start at the end": {"prompt_logprob_token_ids": [[5]], "prompt_logprob_start": 16},
    "start below 0": {"prompt_logprob_token_ids": [[5]] * 16, "prompt_logprob_start": -1},
}


def _send(server: Endpoint, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
    if body is not None and path.startswith(("/v1/chat", "/v1/comp", "/inference")):
        body = {"model": server.model, **body}
    with server.http() as http:
        return http.request(method, path, json=body)


def _differences(real: Any, ours: Any, where: str = "") -> Iterator[str]:
    """One line for each place where our reply is not the real one's."""
    key = where.rsplit(".", 1)[-1]
    if isinstance(real, dict) and isinstance(ours, dict):
        for name in real.keys() - ours.keys():
            yield f"{where}.{name}: missing (real: {str(real[name])[:60]!r})"
        for name in ours.keys() - real.keys():
            yield f"{where}.{name}: not in the real reply (ours: {str(ours[name])[:60]!r})"
        shared = [name for name in real if name in ours]
        if list(real) != list(ours) and not (real.keys() ^ ours.keys()) and key.isdigit():
            yield f"{where}: key order {list(ours)[:4]} instead of {list(real)[:4]}"
        for name in shared:
            yield from _differences(real[name], ours[name], f"{where}.{name}")
    elif isinstance(real, list) and isinstance(ours, list):
        if len(real) != len(ours):
            yield f"{where}: {len(ours)} items instead of {len(real)}"
        for index, (a, b) in enumerate(zip(real, ours, strict=False)):
            yield from _differences(a, b, f"{where}.{index}")
    elif key in FREE:
        if (real is None) != (ours is None) and key != "prompt_tokens_details":
            yield f"{where}: {ours!r} instead of {real!r}"
    elif key == "prompt_token_id_logprobs" and real and ours:
        a, b = array(real), array(ours)
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"{where}: {b.dtype}{b.shape} instead of {a.dtype}{a.shape}"
        else:
            yield from _differences(a.ravel().tolist(), b.ravel().tolist(), f"{where}[npy]")
    elif isinstance(real, float) and isinstance(ours, float):
        if real != ours and not abs(real - ours) <= TOLERANCE:
            yield f"{where}: {ours} instead of {real}"
    elif key == "message" and isinstance(real, str) and real.replace("CPUWorker", "Worker") == ours:
        return  # names the class of the worker
    elif type(real) is not type(ours) or real != ours:
        yield f"{where}: {ours!r} instead of {real!r}"


def _compare(real: httpx.Response, ours: httpx.Response) -> list[str]:
    found = []
    if real.status_code != ours.status_code:
        found.append(f"status {ours.status_code} instead of {real.status_code}")
    kinds = [reply.headers.get("content-type", "").split(";")[0] for reply in (real, ours)]
    if kinds[0] != kinds[1]:
        found.append(f"content-type {kinds[1]!r} instead of {kinds[0]!r}")
    if kinds == ["application/json"] * 2:
        found += _differences(real.json(), ours.json())
    elif real.text != ours.text:
        found.append(f"body {ours.text[:80]!r} instead of {real.text[:80]!r}")
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_embedded_server_answers_as_the_real_vllm(case: str, vllm: Endpoint, embedded: Endpoint):
    method, path, body = CASES[case]
    found = _compare(_send(vllm, method, path, body), _send(embedded, method, path, body))
    if is_at_least(vllm, 33):
        found = [line for line in found if not SINCE_033.fullmatch(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("case", CANDIDATES)
def test_the_embedded_server_scores_candidates_as_the_real_vllm(case: str, guarded_vllm: Endpoint, embedded: Endpoint):
    request = ("POST", "/inference/v1/generate", _generate(**CANDIDATES[case]))
    found = _compare(_send(guarded_vllm, *request), _send(embedded, *request))
    assert not found, "\n".join(found)


def test_the_model_card_has_the_same_fields(vllm: Endpoint, embedded: Endpoint):
    real, ours = (_send(up, "GET", "/v1/models", None).json() for up in (vllm, embedded))
    assert real.keys() == ours.keys()
    [a], [b] = real["data"], ours["data"]
    assert a.keys() == b.keys()
    assert (a["id"], a["root"], a["max_model_len"]) == (b["id"], b["root"], b["max_model_len"])
    assert re.fullmatch(r"modelperm-\w+", b["permission"][0]["id"])
