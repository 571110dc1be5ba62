"""Batching must not be seen in the numbers: concurrent requests give what single ones give."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.contract.servers import Endpoint
from tests.contract.wire import SCORE, complete, token_ids

LENGTHS = (5, 90, 17, 2, 200, 33, 64, 9, 120, 48, 3, 77, 150, 21, 11, 40)


def test_sixteen_concurrent_scores_equal_sixteen_single_ones(server: Endpoint):
    prompts = [token_ids(n, seed=40 + i) for i, n in enumerate(LENGTHS)]

    def score(ids: list[int]) -> list:
        return complete(server, ids, prompt_logprobs=10, **SCORE)[0]["prompt_logprobs"]

    single = [score(ids) for ids in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(score, prompts))
    for alone, batched in zip(single, together, strict=True):
        assert len(alone) == len(batched)
        for row, other in zip(alone[1:], batched[1:], strict=True):
            assert next(iter(row)) == next(iter(other))
            for key in row.keys() & other.keys():
                assert other[key]["logprob"] == pytest.approx(row[key]["logprob"], abs=2e-5)
            # Only ids at the edge of the list may differ, and only by rounding.
            for key in row.keys() ^ other.keys():
                edge = min(entry["logprob"] for entry in row.values() if entry["rank"] <= 10)
                assert (row.get(key) or other[key])["logprob"] == pytest.approx(edge, abs=2e-5)


def test_scoring_beside_sampling_changes_neither(server: Endpoint):
    prompts = [token_ids(20 + i, seed=60 + i) for i in range(8)]

    def score(ids: list[int]) -> list[float]:
        rows = complete(server, ids, prompt_logprobs=0, **SCORE)[0]["prompt_logprobs"][1:]
        return [next(iter(row.values()))["logprob"] for row in rows]

    def greedy(ids: list[int]) -> tuple[list[int], list[float]]:
        [choice] = complete(
            server, ids, max_tokens=16, temperature=0, logprobs=0, return_token_ids=True, ignore_eos=True
        )
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    alone = [(score(ids), greedy(ids)) for ids in prompts]
    with ThreadPoolExecutor(16) as pool:
        scores = [pool.submit(score, ids) for ids in prompts]
        draws = [pool.submit(greedy, ids) for ids in prompts]
        together = [(s.result(), d.result()) for s, d in zip(scores, draws, strict=True)]
    for (score_alone, (ids_alone, logp_alone)), (score_both, (ids_both, logp_both)) in zip(
        alone, together, strict=True
    ):
        assert score_both == pytest.approx(score_alone, abs=2e-5)
        assert ids_both == ids_alone
        assert logp_both == pytest.approx(logp_alone, abs=2e-5)
