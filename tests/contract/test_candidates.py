"""Candidates: chosen ids at every position, one matrix back. Short prompts: the real server interprets its kernels."""

from __future__ import annotations

import numpy as np
import pytest

from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint
from tests.contract.wire import array, generate, post, refused, token_ids

TOLERANCE = 1e-4


def _candidates(rows: int, k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(2048, k, replace=False) for _ in range(rows)])


@pytest.mark.parametrize(("length", "k"), [(2, 1), (9, 3), (17, 64)])
def test_every_candidate_is_scored_in_the_order_asked(guarded: Endpoint, length: int, k: int):
    ids = token_ids(length, seed=100 + length)
    asked = _candidates(length - 1, k, seed=length)
    body = generate(guarded, ids, prompt_logprob_token_ids=asked.tolist())
    got = array(body["prompt_token_id_logprobs"])
    assert got.dtype == np.float32
    exact = np.take_along_axis(logp_rows(guarded.model_dir, ids)[:-1], asked, axis=1)
    np.testing.assert_allclose(got, exact, rtol=0, atol=TOLERANCE)


def test_a_start_leaves_out_the_rows_before_it(guarded: Endpoint):
    ids, start = token_ids(17, seed=120), 12
    asked = _candidates(len(ids) - 1 - start, 4, seed=1)
    sampling = {"prompt_logprob_token_ids": asked.tolist(), "prompt_logprob_start": start}
    got = array(generate(guarded, ids, **sampling)["prompt_token_id_logprobs"])
    exact = np.take_along_axis(logp_rows(guarded.model_dir, ids)[start:-1], asked, axis=1)
    np.testing.assert_allclose(got, exact, rtol=0, atol=TOLERANCE)


def test_ragged_rows_and_minus_one_are_padded_with_minus_infinity(guarded: Endpoint):
    ids = token_ids(5, seed=121)
    got = array(
        generate(guarded, ids, prompt_logprob_token_ids=[[50, 9], [7, -1], [3], [-1]])["prompt_token_id_logprobs"]
    )
    assert np.isneginf(got).tolist() == [[False, False], [False, True], [False, True], [True, True]]
    exact = logp_rows(guarded.model_dir, ids)
    assert got[0] == pytest.approx([exact[0, 50], exact[0, 9]], abs=TOLERANCE)
    assert got[1, 0] == pytest.approx(exact[1, 7], abs=TOLERANCE)
    assert got[2, 0] == pytest.approx(exact[2, 3], abs=TOLERANCE)


def test_the_temperature_does_not_reach_candidates(guarded: Endpoint):
    ids, asked = token_ids(9, seed=122), _candidates(8, 5, seed=2).tolist()
    plain, heated = (
        array(generate(guarded, ids, temperature=t, prompt_logprob_token_ids=asked)["prompt_token_id_logprobs"])
        for t in (1.0, 0.3)
    )
    np.testing.assert_allclose(plain, heated, rtol=0, atol=1e-5)


def test_candidates_and_top_k_of_one_request_agree(guarded: Endpoint):
    ids = token_ids(9, seed=123)
    body = generate(guarded, ids, prompt_logprobs=0, prompt_logprob_token_ids=[[i] for i in ids[1:]])
    listed = [next(iter(row.values()))["logprob"] for row in body["prompt_logprobs"][1:]]
    assert array(body["prompt_token_id_logprobs"])[:, 0] == pytest.approx(listed, abs=1e-5)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (
            {"prompt_logprob_token_ids": [[5], [6]], "prompt_logprob_start": 4},
            "has 2 rows, but the prompt has 4 scored rows",
        ),
        ({"prompt_logprob_token_ids": [[2048]] * 8}, "contain out-of-vocab token ids"),
        ({"prompt_logprob_token_ids": [list(range(65))] * 8}, "greater than max allowed: 64"),
        ({"prompt_logprob_token_ids": []}, "must be a non-empty integer array"),
        ({"prompt_logprob_token_ids": [[5]], "prompt_logprob_start": 8}, "has 0 scored rows"),
        ({"prompt_logprob_token_ids": [[5]] * 8, "prompt_logprob_start": -1}, "must be non-negative"),
        ({"prompt_logprob_start": 3}, "prompt_logprob_start requires prompt_logprob_token_ids"),
    ],
)
def test_a_candidate_request_that_cannot_be_right_is_refused(guarded: Endpoint, sampling: dict, words: str):
    body = {"model": guarded.model, "token_ids": token_ids(9), "sampling_params": {"max_tokens": 1, **sampling}}
    assert words in refused(guarded, "/inference/v1/generate", body)["message"]


def test_the_flat_schema_of_older_releases_is_refused_not_misread(guarded: Endpoint):
    """0.31 took one flat list for all rows; a client tells the two apart by this refusal (or by /version)."""
    body = {
        "model": guarded.model,
        "token_ids": token_ids(9),
        "sampling_params": {"max_tokens": 1, "prompt_logprob_token_ids": [5, 9]},
    }
    error = refused(guarded, "/inference/v1/generate", body)
    assert "prompt_logprob_token_ids.0" in error["message"]
    assert "valid list" in error["message"]


def test_candidates_are_refused_on_a_stream(guarded: Endpoint):
    body = {
        "model": guarded.model,
        "token_ids": token_ids(5),
        "sampling_params": {"max_tokens": 1, "prompt_logprob_token_ids": [[5]] * 4},
        "stream": True,
    }
    reply = post(guarded, "/inference/v1/generate", body)
    assert reply.status_code == 400
    assert "not available when stream" in reply.json()["error"]["message"]


@pytest.mark.vllm
@pytest.mark.slow
def test_a_vllm_without_model_runner_v2_says_so_instead_of_answering_without_the_field(vllm: Endpoint):
    body = {
        "model": vllm.model,
        "token_ids": token_ids(5),
        "sampling_params": {"max_tokens": 1, "prompt_logprob_token_ids": [[5]] * 4},
    }
    assert "requires the V2 model runner" in refused(vllm, "/inference/v1/generate", body)["message"]
