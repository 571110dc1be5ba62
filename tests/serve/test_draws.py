"""Drawn tokens come from the distribution that was asked for, and their logprobs are the model's own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from starlette.applications import Starlette

from tests.serve.apps import NAME, client, complete, exact_logp, generate, make_app, post, random_ids
from topkd.serve.engine.jobs import EngineJob, SamplingJob
from topkd.serve.engine.sequences import GeneratedSequence, draw_tokens

TOLERANCE = 1e-4  # float32 against float64; these models have logits of +-30
IDS = {"return_token_ids": True, "ignore_eos": True}


async def _draws(app: Starlette, n: int, prompt: list[int], **fields: object) -> np.ndarray:
    choices = await complete(app, prompt, n=n, seed=7, return_token_ids=True, **fields)
    return np.array([choice["token_ids"][0] for choice in choices])


def _frequencies_agree(tokens: np.ndarray, p: np.ndarray) -> None:
    """Pearson's chi-squared over the tokens expected at least 5 times, the rest in one bin; 6 sigma."""
    n = len(tokens)
    big = np.flatnonzero(n * p >= 5)
    seen = np.append([(tokens == token).sum() for token in big], 0.0)
    want = np.append(n * p[big], n * (1 - p[big].sum()))
    seen[-1] = n - seen.sum()
    if want[-1] < 1e-6:
        assert seen[-1] == 0
        seen, want = seen[:-1], want[:-1]
    freedom = len(want) - 1
    chi2 = ((seen - want) ** 2 / np.maximum(want, 1e-9)).sum()
    assert chi2 < freedom + 6 * np.sqrt(2 * max(freedom, 1)), f"chi2 {chi2:.1f} at {freedom} degrees of freedom"


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


@pytest.mark.parametrize(
    ("fields", "law"),
    [
        ({}, np.exp),
        ({"temperature": 0.6}, lambda row: _softmax(row / 0.6)),
        ({"temperature": 1.7}, lambda row: _softmax(row / 1.7)),
        ({"top_k": 5}, lambda row: _softmax(np.where(row >= np.sort(row)[-5], row, -np.inf))),
        ({"min_p": 0.1}, lambda row: _softmax(np.where(row >= row.max() + np.log(0.1), row, -np.inf))),
        ({"top_p": 0.7}, lambda row: _nucleus(row, 0.7)),
        ({"temperature": 0.8, "top_k": 40, "top_p": 0.9}, lambda row: _nucleus(_cut(row / 0.8, 40), 0.9)),
        ({"logit_bias": {"77": 12.0}}, lambda row: _softmax(row + 12.0 * (np.arange(2048) == 77))),
        ({"allowed_token_ids": [5, 77, 900]}, lambda row: _softmax(_only(row, [5, 77, 900]))),
    ],
)
async def test_draws_follow_the_law_that_was_asked_for(app: Starlette, models: Path, fields: dict, law):
    prompt = random_ids(6, seed=31)
    p = law(exact_logp(models / "policy", prompt)[-1])
    _frequencies_agree(await _draws(app, 3000, prompt, **fields), p)


def _only(row: np.ndarray, ids: list[int]) -> np.ndarray:
    out = np.full_like(row, -np.inf)
    out[ids] = row[ids]
    return out


def _cut(row: np.ndarray, k: int) -> np.ndarray:
    return np.where(row >= np.sort(row)[-k], row, -np.inf)


def _nucleus(row: np.ndarray, top_p: float) -> np.ndarray:
    """The shortest list of likeliest tokens whose mass reaches top_p."""
    p = _softmax(row)
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    return _softmax(_only(row, kept.tolist()))


class _Numbers:
    """A generator that gives one number."""

    def __init__(self, number: float) -> None:
        self.random = lambda: number


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 1), (0.4999, 1), (0.5, 3), (0.9999, 3), (float(np.nextafter(1.0, 0.0)), 3)]
)
def test_no_number_picks_a_token_without_probability_and_a_greedy_row_takes_none(number: float, token: int):
    half, none = np.log(0.5), -np.inf
    logits = torch.tensor([[none, half, none, half, none], [0.0, 1.0, none, 3.0, 2.0]])
    rows = [
        GeneratedSequence(EngineJob((5,), SamplingJob(temperature=t)), 0, 1, frozenset(), _Numbers(number))
        for t in (1.0, 0.0)
    ]
    assert draw_tokens(logits, rows).tolist() == [[token], [3]]


async def test_penalties_change_what_is_drawn_but_not_what_is_reported(app: Starlette, models: Path):
    prompt = random_ids(8, seed=32)
    fields = {"max_tokens": 12, "temperature": 0, "logprobs": 0, **IDS}
    [plain] = await complete(app, prompt, **fields)
    [varied] = await complete(
        app, prompt, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=1.5, **fields
    )
    assert plain["token_ids"] != varied["token_ids"]
    logits = exact_logp(models / "policy", prompt + varied["token_ids"])[len(prompt) - 1 :]
    for position, token in enumerate(varied["token_ids"]):
        before = varied["token_ids"][:position]
        counts = np.bincount(before, minlength=2048)
        row = _raw_logits(app, prompt + before)
        seen = np.zeros(2048, dtype=bool)
        seen[[*prompt, *before]] = True
        row = np.where(seen, np.where(row > 0, row / 1.5, row * 1.5), row) - 2.0 * counts - 2.0 * (counts > 0)
        assert token == row.argmax()
        assert abs(varied["logprobs"]["token_logprobs"][position] - logits[position, token]) < TOLERANCE


def _raw_logits(app: Starlette, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return app.state.served.model(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()


async def test_generated_logprobs_are_exact_at_every_step_of_a_mixed_batch(app: Starlette, models: Path):
    """Prompts of many lengths, ending at different times, some joining while others run."""

    async def one(index: int) -> None:
        await asyncio.sleep(0.01 * (index % 5))
        prompt = random_ids(3 + 7 * index, seed=index)
        [choice] = await complete(
            app, prompt, max_tokens=5 + 3 * index, seed=index, logprobs=3, **IDS, return_tokens_as_token_ids=True
        )
        tokens = choice["token_ids"]
        assert len(tokens) == 5 + 3 * index
        rows = exact_logp(models / "policy", prompt + tokens)[len(prompt) - 1 :]
        for row, token, logp, listed in zip(
            rows, tokens, choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=False
        ):
            assert abs(logp - row[token]) < TOLERANCE
            named = {int(key.removeprefix("token_id:")): value for key, value in listed.items()}
            assert set(named) == {token, *np.argsort(-row)[:3].tolist()}
            assert all(abs(value - row[key]) < TOLERANCE for key, value in named.items())

    await asyncio.gather(*(one(index) for index in range(12)))


async def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(app: Starlette):
    prompts = [random_ids(4 + 3 * i, seed=50 + i) for i in range(8)]

    async def draw(index: int) -> list[int]:
        [choice] = await complete(app, prompts[index], max_tokens=20, seed=100 + index, **IDS)
        return choice["token_ids"]

    alone = [await draw(index) for index in range(8)]
    crowd = await asyncio.gather(*(draw(index) for index in range(8)))
    assert crowd == alone


async def test_the_seeds_of_n_choices_follow_each_other(app: Starlette):
    prompt = random_ids(5, seed=60)
    several = await complete(app, prompt, n=3, seed=40, max_tokens=6, **IDS)
    single = [(await complete(app, prompt, seed=40 + i, max_tokens=6, **IDS))[0] for i in range(3)]
    assert [c["token_ids"] for c in several] == [c["token_ids"] for c in single]
    assert len({tuple(c["token_ids"]) for c in several}) == 3


async def test_unseeded_draws_differ_from_each_other_and_repeat_with_the_server_seed(models: Path):
    async def first(seed: int) -> list[list[int]]:
        app = make_app(models / "policy", seed=seed)
        choices = [(await complete(app, [9, 10], max_tokens=8, **IDS))[0]["token_ids"] for _ in range(2)]
        app.state.served.engine.stop()
        return choices

    one, again, other = [await first(seed) for seed in (1, 1, 2)]
    assert one == again
    assert one[0] != one[1]
    assert one != other


async def test_processed_logprobs_are_of_the_distribution_drawn_from(models: Path):
    app = make_app(models / "policy", logprobs_mode="processed_logprobs")
    prompt = random_ids(7, seed=61)
    [choice] = await complete(app, prompt, temperature=0.5, top_k=4, logprobs=6, return_tokens_as_token_ids=True, **IDS)
    p = _softmax(_cut(exact_logp(models / "policy", prompt)[-1] / 0.5, 4))
    [listed] = choice["logprobs"]["top_logprobs"]
    named = {int(key.removeprefix("token_id:")): value for key, value in listed.items()}
    kept = {token: value for token, value in named.items() if value > -9999}
    assert set(kept) == set(np.flatnonzero(p))
    for token, value in kept.items():
        assert abs(value - np.log(p[token])) < TOLERANCE
    app.state.served.engine.stop()


async def test_eos_ends_a_draw_keeps_its_id_and_has_no_text(app: Starlette):
    prompt = random_ids(5, seed=62)
    eos = app.state.served.words.tokenizer.eos_token_id
    fields = {"max_tokens": 9, "temperature": 0, "return_token_ids": True, "logprobs": 0}
    [ended] = await complete(app, prompt, logit_bias={str(eos): 100}, **fields)
    assert ended["token_ids"] == [eos]
    assert (ended["finish_reason"], ended["stop_reason"], ended["text"]) == ("stop", None, "")
    assert ended["logprobs"]["token_logprobs"][0] < -1, "the bias is not in the logprob"
    [held] = await complete(app, prompt, logit_bias={str(eos): 100}, min_tokens=4, **fields)
    assert held["token_ids"].index(eos) == 4
    [ignored] = await complete(app, prompt, logit_bias={str(eos): 100}, ignore_eos=True, **fields)
    assert ignored["token_ids"] == [eos] * 9
    assert ignored["finish_reason"] == "length"


async def test_a_stop_string_cuts_the_text_and_keeps_the_ids_it_needed(app: Starlette):
    prompt = random_ids(5, seed=63)
    fields = {"max_tokens": 20, "temperature": 0, **IDS}
    [whole] = await complete(app, prompt, **fields)
    word = whole["text"][4:7]
    [cut] = await complete(app, prompt, stop=[word], **fields)
    assert cut["text"] == whole["text"][: whole["text"].index(word)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", word)
    assert whole["token_ids"][: len(cut["token_ids"])] == cut["token_ids"]
    [kept] = await complete(app, prompt, stop=word, include_stop_str_in_output=True, **fields)
    assert kept["text"] == cut["text"] + word


async def test_chosen_ids_are_scored_at_drawn_positions(app: Starlette, models: Path):
    prompt = random_ids(9, seed=64)
    body = await generate(app, prompt, max_tokens=3, seed=1, logprobs=2, logprob_token_ids=[5, 700], ignore_eos=True)
    [choice] = body["choices"]
    rows = exact_logp(models / "policy", prompt + choice["token_ids"])[len(prompt) - 1 :]
    for row, entry in zip(rows, choice["logprobs"]["content"], strict=False):
        assert [top["token_id"] for top in entry["top_logprobs"]] == [entry["token_id"], 5, 700]
        for top in entry["top_logprobs"]:
            assert abs(top["logprob"] - row[top["token_id"]]) < TOLERANCE
            assert top["rank"] == 1 + (row > row[top["token_id"]]).sum()


async def test_completions_and_chat_name_the_weights_of_each_token_when_asked(app: Starlette):
    """As vLLM does from 0.33 on; unasked, the reply is that of 0.32."""
    [choice] = await complete(app, random_ids(5), max_tokens=3, return_weight_versions=True, **IDS)
    assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": 3}]
    [plain] = await complete(app, random_ids(5), max_tokens=3, **IDS)
    assert "weight_versions" not in plain
    chat = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "ignore_eos": True}
    reply = await post(app, "/v1/chat/completions", chat | {"return_weight_versions": True})
    assert reply["choices"][0]["weight_versions"] == [{"version": "default", "start": 0, "end": 2}]


@pytest.mark.parametrize(
    ("n", "tokens", "words"),
    [
        (2**31, 1, "n must be at most 16384"),
        (16_384, 60, "1245184 of cache, and there are 524288"),
        (0, 1, "at least 1"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/inference/v1/generate"])
async def test_more_completions_than_fit_are_refused_before_anything_is_made_for_them(
    app: Starlette, path: str, n: int, tokens: int, words: str
):
    sampling = {"n": n, "max_tokens": tokens}
    body = (
        {"token_ids": [9] * 16, "sampling_params": sampling} if "generate" in path else {"prompt": [9] * 16, **sampling}
    )
    async with client(app) as http:
        reply = await http.post(path, json={"model": NAME, **body})
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]
