"""The older candidates schema (vLLM 0.31): one flat list for all rows. Runs where that release is installed.

``VLLM_RELEASE=0.31.0 VLLM_VENV=.venv-vllm-0.31 bash scripts/setup_vllm.sh`` (100 s, 3.4 GB).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.contract.conftest import MAX_LOGPROBS, MAX_MODEL_LEN, Models
from tests.contract.reference import logp_rows
from tests.contract.servers import OLDER_VLLM_PYTHON, Endpoint, vllm_server
from tests.contract.wire import array, generate, get, refused, token_ids
from topkd.clients import ClientConfig
from topkd.clients.dialects.vllm_generate import VllmGenerate

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        not OLDER_VLLM_PYTHON.exists(), reason="vLLM 0.31 is not installed in .venv-vllm-0.31 (optional)"
    ),
]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def older_vllm(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    log = tmp_path_factory.mktemp("older-vllm") / "server.log"
    with vllm_server(
        models.policy,
        model="t",
        log=log,
        max_logprobs=MAX_LOGPROBS,
        max_model_len=MAX_MODEL_LEN,
        candidates=True,
        python=OLDER_VLLM_PYTHON,
    ) as up:
        yield up


def test_one_flat_list_is_scored_at_every_row(older_vllm: Endpoint):
    assert get(older_vllm, "/version").json()["version"].startswith("0.31")
    ids, asked = token_ids(17, seed=600), [1500, 7, 400]
    got = array(generate(older_vllm, ids, prompt_logprob_token_ids=asked)["prompt_token_id_logprobs"])
    exact = logp_rows(older_vllm.model_dir, ids)[:-1, asked]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, exact, rtol=0, atol=TOLERANCE)


def test_a_start_leaves_out_the_rows_before_it(older_vllm: Endpoint):
    ids, asked = token_ids(17, seed=601), [9, 10]
    sampling = {"prompt_logprob_token_ids": asked, "prompt_logprob_start": 12}
    got = array(generate(older_vllm, ids, **sampling)["prompt_token_id_logprobs"])
    np.testing.assert_allclose(got, logp_rows(older_vllm.model_dir, ids)[12:-1, asked], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("asked", [[5, 5], [5, -1], [[5]] * 8], ids=["repeated", "padded", "rows"])
def test_repeats_pads_and_the_newer_schema_are_refused(older_vllm: Endpoint, asked: list):
    body = {
        "model": older_vllm.model,
        "token_ids": token_ids(9),
        "sampling_params": {"max_tokens": 1, "prompt_logprob_token_ids": asked},
    }
    assert refused(older_vllm, "/inference/v1/generate", body)["message"]


async def test_our_client_serves_a_list_a_row_from_the_shared_schema(older_vllm: Endpoint):
    rng = np.random.default_rng(0)
    ids = token_ids(9, seed=602)
    wanted = np.stack([rng.choice(2048, 4, replace=False) for _ in range(8)]).astype(np.int32)
    wanted[2, 3] = -1
    async with VllmGenerate(older_vllm.url, config=ClientConfig(max_retries=1)) as up:
        got = await up.score_candidates(ids, 0, wanted)
    exact = np.take_along_axis(logp_rows(older_vllm.model_dir, ids)[:-1], np.maximum(wanted, 0), axis=1)
    np.testing.assert_allclose(got, np.where(wanted < 0, -np.inf, exact), rtol=0, atol=TOLERANCE)
