"""vLLM in a process of its own, without a server: the flat logprobs of ``LLM.generate`` against the float64 pass."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.conftest import Models, need_vllm
from tests.contract.reference import logp_rows, ranks
from tests.contract.servers import VLLM_PYTHON, vllm_env
from tests.contract.wire import token_ids

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

K = 5
PROMPTS = [token_ids(n, seed=300 + n) for n in (17, 3, 200, 1)]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reply(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    need_vllm()
    folder = tmp_path_factory.mktemp("inprocess")
    request = folder / "request.json"
    request.write_text(json.dumps({"prompts": PROMPTS, "k": K}))
    done = subprocess.run(
        [str(VLLM_PYTHON), str(Path(__file__).with_name("inprocess_check.py")), str(models.policy), str(request)],
        env=vllm_env(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("REPLY ")]
    return dict(json.loads(line.removeprefix("REPLY ")))


def _rows(table: dict[str, Any]) -> list[list[tuple[int, float, int]]]:
    entries = list(zip(table["token_ids"], table["logprobs"], table["ranks"], strict=True))
    bounds = zip(table["start_indices"], table["end_indices"], strict=True)
    return [entries[first:last] for first, last in bounds]


@pytest.mark.parametrize("which", range(len(PROMPTS)))
def test_flat_prompt_logprobs_are_the_realised_token_then_the_top_k(reply: dict, models: Models, which: int):
    ids = PROMPTS[which]
    exact = logp_rows(models.policy, ids)
    table = reply["flat"][which]
    assert table["type"] == "FlatLogprobs"
    rows = _rows(table)
    assert len(rows) == table["len"] == len(ids)
    assert rows[0] == [], "position 0 is an empty row here, not a null"
    for position, row in enumerate(rows[1:], start=1):
        truth = exact[position - 1]
        assert len(row) == K + 1, "always K+1: the realised token is repeated when the list holds it"
        assert row[0][0] == ids[position]
        assert row[0][2] == ranks(truth)[ids[position]]
        assert [rank for _, _, rank in row[1:]] == list(range(1, K + 1))
        assert {token for token, _, _ in row[1:]} == set(np.argsort(-truth)[:K].tolist())
        for token, logp, _ in row:
            assert logp == pytest.approx(truth[token], abs=TOLERANCE)


def test_nested_logprobs_hold_the_same_entries_once_each(reply: dict):
    for table, nested in zip(reply["flat"], reply["nested"], strict=True):
        assert nested[0] is None
        for row, listed in zip(_rows(table)[1:], nested[1:], strict=True):
            assert [entry[0] for entry in listed] == list(dict.fromkeys(token for token, _, _ in row))
            flat = {token: logp for token, logp, _ in row}
            assert {token: logp for token, logp, _ in listed} == pytest.approx(flat, abs=2e-5)


def test_replies_come_in_the_order_of_the_prompts(reply: dict):
    assert reply["order"] == PROMPTS


def test_in_process_draws_carry_their_exact_logprobs(reply: dict, models: Models):
    for ids, drawn in zip(PROMPTS, reply["drawn"], strict=True):
        exact = logp_rows(models.policy, ids + drawn["token_ids"])[len(ids) - 1 :]
        rows = _rows(drawn["logprobs"])
        assert len(rows) == len(drawn["token_ids"]) == 8, "no empty first row in generated logprobs"
        for truth, token, row in zip(exact, drawn["token_ids"], rows, strict=False):
            assert row[0][0] == token
            assert row[0][1] == pytest.approx(truth[token], abs=TOLERANCE)
        assert drawn["cumulative_logprob"] == pytest.approx(sum(row[0][1] for row in rows), abs=1e-3)
