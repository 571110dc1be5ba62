"""Mutated replies of every dialect: the exact rows, or a typed error; never another exception, never other rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.clients.dialects.test_fireworks import position
from tests.clients.dialects.test_sglang import TOY as SGLANG_TOY
from tests.clients.dialects.test_sglang import meta
from tests.clients.dialects.test_vllm_generate import generated
from tests.clients.toy import VOCAB, Toy, npy
from tests.clients.vllm_toy import VllmToy
from topkd.clients.decoding import openai as openai_replies
from topkd.clients.decoding import sglang as sglang_replies
from topkd.clients.decoding.sampled import SampleRequest, read_generate_rollouts
from topkd.clients.dialects import fireworks, vllm_generate
from topkd.topk.errors import TopkdError
from topkd.topk.samples import SamplingParams

TOY = Toy(seed=21)
IDS = np.random.default_rng(22).integers(0, VOCAB, 9).astype(np.int32)
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**40,
    2**70,
    1e300,
    -1e300,
    0.5,
    -0.0,
    "",
    "x",
    "token_id:x",
    "Ã",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
]
ASKED = SampleRequest(np.array([5, 6, 7, 8], dtype=np.int32), 1, SamplingParams(6, seed=1), 3, VOCAB, True)


def _sglang(flat: bool, k: int = 5) -> Any:
    body = {
        "input_ids": IDS.tolist(),
        "logprob_start_len": 2,
        "top_logprobs_num": k,
        "sampling_params": {"max_new_tokens": 0},
    }
    return {"meta_info": meta(body, flat=flat)}


def _chat() -> Any:
    top = [
        {"token": "a", "id": 3, "logprob": -0.5, "bytes": [97]},
        {"token": "b", "id": 4, "logprob": -1.5, "bytes": [98]},
    ]
    content = [{"token": "a", "id": 3, "logprob": -0.5, "bytes": [97], "top_logprobs": top} for _ in range(4)]
    choice = {"index": 0, "message": {"content": "aaaa"}, "finish_reason": "length", "logprobs": {"content": content}}
    return {"choices": [choice], "usage": {"prompt_tokens": 4}}


def _candidates() -> Any:
    return {"prompt_token_id_logprobs": npy(TOY.rows(IDS)[:, :4]), "choices": []}


def _echo() -> Any:
    content = [position(row, int(t), 5) for row, t in zip(TOY.rows(IDS)[2:], IDS[3:], strict=True)]
    return {"choices": [{"index": 0, "logprobs": {"content": content}, "finish_reason": "length"}]}


def _scored() -> Any:
    return VllmToy(toy=TOY)(
        "POST",
        "/inference/v1/generate",
        {"token_ids": IDS.tolist(), "sampling_params": {"max_tokens": 1, "prompt_logprobs": 5}},
    )[1]


CASES: dict[str, tuple[Any, Callable[[bytes], Any]]] = {
    "generate score": (
        _scored(),
        lambda b: vllm_generate.read_generate_scores(b, ids=IDS, start=2, k=5, vocab_size=VOCAB)[0],
    ),
    "generate candidates": (_candidates(), lambda b: vllm_generate.read_generate_candidates(b, rows=8, columns=4)),
    "generate draw": (
        generated("ranked", TOY.draw([8], 6), k=4, cut=True),
        lambda b: read_generate_rollouts(b, asked=ASKED),
    ),
    "sglang flat": (
        _sglang(flat=True),
        lambda b: sglang_replies.read_sglang_scores(b, ids=IDS, start=2, k=5, vocab_size=VOCAB)[0],
    ),
    "sglang nested": (
        _sglang(flat=False),
        lambda b: sglang_replies.read_sglang_scores(b, ids=IDS, start=2, k=5, vocab_size=VOCAB)[0],
    ),
    "fireworks echo": (_echo(), lambda b: fireworks.read_fireworks_scores(b, ids=IDS, start=2, k=5, vocab_size=VOCAB)),
    "chat": (_chat(), lambda b: openai_replies.read_chat_rollouts(b, asked=ASKED, table=None)),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deep for key, item in inner for deep in places(item, (*path, key)))]


def mutated(value: Any, rng: np.random.Generator) -> bytes:
    value = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, 3))):
        path = list(places(value))[int(rng.integers(1, len(places(value))))]
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        kind = rng.integers(5)
        if kind == 0:
            del holder[path[-1]]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
        elif kind == 2 and isinstance(holder, list) and len(holder) > 1:
            other = int(rng.integers(len(holder)))
            holder[path[-1]], holder[other] = holder[other], holder[path[-1]]
        elif kind == 3 and isinstance(holder[path[-1]], int | float):
            holder[path[-1]] = holder[path[-1]] + rng.choice([1, -1, 0.5, 1e9])
        else:
            holder[path[-1]] = copy.deepcopy(ODD[int(rng.integers(len(ODD)))])
        if len(places(value)) < 2:
            break
    body = json.dumps(value).encode()
    if rng.random() < 0.1:
        at = int(rng.integers(len(body)))
        body = body[:at] + bytes([int(rng.integers(256))]) + body[at + 1 :]
    return body


def _count(name: str, count: int) -> dict[str, int]:
    reply, parse = CASES[name]
    rng = np.random.default_rng(len(name))
    ends = {"accepted": 0, "refused": 0}
    for _ in range(count):
        body = mutated(reply, rng)
        try:
            got = parse(body)
        except TopkdError:
            ends["refused"] += 1
            continue
        ends["accepted"] += 1
        if hasattr(got, "actual_ids"):  # accepted rows are about the tokens that were asked about
            np.testing.assert_array_equal(got.actual_ids, IDS[3:])
            assert (got.mass() <= 1.001).all()
            assert got.ids.max() < VOCAB
            assert np.isfinite(got.actual_logp).all() or np.isneginf(got.actual_logp).any()
    return ends


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("generate score", "sglang", "fire"))])
def test_the_unchanged_score_gives_the_teachers_own_numbers(name: str):
    reply, parse = CASES[name]
    got, rows = parse(json.dumps(reply).encode()), (SGLANG_TOY if "sglang" in name else TOY).rows(IDS)[2:8]
    best = np.argsort(-rows, axis=1)[:, :5]
    np.testing.assert_array_equal(got.ids, best)
    np.testing.assert_allclose(got.logp, np.take_along_axis(rows, best, axis=1), rtol=1e-6)
    np.testing.assert_allclose(got.actual_logp, rows[np.arange(6), IDS[3:]], rtol=1e-6)


def test_the_unchanged_candidates_and_draws_give_what_the_reply_holds():
    candidates, draw, chat = (CASES[name] for name in ("generate candidates", "generate draw", "chat"))
    np.testing.assert_allclose(candidates[1](json.dumps(candidates[0]).encode()), TOY.rows(IDS)[:, :4], rtol=1e-6)
    (drawn,) = draw[1](json.dumps(draw[0]).encode())
    assert drawn.completion_ids.tolist() == draw[0]["choices"][0]["token_ids"]
    said = [entry["logprob"] for entry in draw[0]["choices"][0]["logprobs"]["content"]]
    np.testing.assert_allclose(drawn.logp, said, rtol=1e-6)
    (answer,) = chat[1](json.dumps(chat[0]).encode()).rollouts
    assert (answer.completion_ids.tolist(), answer.logp.tolist()) == ([3] * 4, [-0.5] * 4)
    assert answer.topk.ids[:, :2].tolist() == [[3, 4]] * 4


@pytest.mark.parametrize("name", CASES)
def test_five_hundred_mutations_end_in_rows_or_a_typed_error(name: str):
    ends = _count(name, 500)
    assert ends["refused"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_twenty_thousand_mutations_end_in_rows_or_a_typed_error(name: str):
    assert _count(name, 20_000)["refused"] > 2_000
