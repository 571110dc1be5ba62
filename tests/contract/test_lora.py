"""LoRA: adapters loaded, replaced in place and unloaded at run time, each exact against merged float64 weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.conftest import Models
from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint
from tests.contract.wire import SCORE, complete, get, post, refused, token_ids

TOLERANCE = 1e-4
PROMPT = token_ids(40, seed=90)


@pytest.fixture
def load(server: Endpoint, cleanup: Callable) -> Iterator[Callable]:
    def loader(name: str, folder: Path, **fields: object) -> None:
        body = {"lora_name": name, "lora_path": str(folder), **fields}
        reply = post(server, "/v1/load_lora_adapter", body)
        assert reply.status_code == 200, reply.text
        if not fields:
            cleanup(post, server, "/v1/unload_lora_adapter", {"lora_name": name})
        assert reply.text == f"Success: LoRA adapter '{name}' added successfully.", "plain text, not JSON"

    return loader


def _error(server: Endpoint, model: str, adapter: Path | None) -> float:
    """Largest error of scored and generated logprobs under ``model`` against base weights plus ``adapter``."""
    [choice] = complete(
        server, PROMPT, **{**SCORE, "model": model, "max_tokens": 4}, prompt_logprobs=3, logprobs=0, ignore_eos=True
    )
    exact = logp_rows(server.model_dir, PROMPT + choice["token_ids"], adapter=adapter)
    scored = [
        abs(entry["logprob"] - exact[position - 1, int(key)])
        for position, row in enumerate(choice["prompt_logprobs"])
        for key, entry in (row or {}).items()
    ]
    drawn = zip(exact[len(PROMPT) - 1 :], choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=False)
    return max(*scored, *(abs(row[token] - logp) for row, token, logp in drawn))


def test_an_adapter_is_a_model_of_its_own_and_leaves_the_base_alone(server: Endpoint, models: Models, load: Callable):
    load("step-1", models.adapter)
    cards = {card["id"]: card for card in get(server, "/v1/models").json()["data"]}
    assert cards["step-1"]["parent"] == server.model
    assert cards["step-1"]["root"] == str(models.adapter)
    assert _error(server, "step-1", models.adapter) < TOLERANCE
    assert _error(server, server.model, None) < TOLERANCE
    assert _error(server, "step-1", None) > 0.01, "the adapter must change the distribution"


def test_two_versions_are_served_side_by_side(server: Endpoint, models: Models, load: Callable):
    first, second = "step-1", "org/Policy-0.5B@2"  # names as they come: module names hold no dot
    load(first, models.adapter)
    load(second, models.updated_adapter)
    for name, folder in ((first, models.adapter), (second, models.updated_adapter), (first, models.adapter)):
        assert _error(server, name, folder) < TOLERANCE


def test_loading_a_name_again_is_refused_unless_in_place_and_then_no_cache_is_stale(
    server: Endpoint, models: Models, load: Callable
):
    load("step-1", models.adapter)
    assert _error(server, "step-1", models.adapter) < TOLERANCE
    again = {"lora_name": "step-1", "lora_path": str(models.updated_adapter)}
    assert "has already been loaded" in refused(server, "/v1/load_lora_adapter", again)["message"]
    assert _error(server, "step-1", models.adapter) < TOLERANCE
    load("step-1", models.updated_adapter, load_inplace=True)
    assert _error(server, "step-1", models.updated_adapter) < TOLERANCE


def test_an_unloaded_adapter_is_an_unknown_model(server: Endpoint, models: Models, load: Callable):
    load("step-1", models.adapter)
    reply = post(server, "/v1/unload_lora_adapter", {"lora_name": "step-1"})
    assert reply.text == "Success: LoRA adapter 'step-1' removed successfully."
    error = refused(server, "/v1/completions", {"model": "step-1", "prompt": [9], "max_tokens": 1})
    assert error["code"] == 404


def test_an_adapter_that_is_not_there_is_refused_and_the_server_lives(server: Endpoint):
    missing = {"lora_name": "ghost", "lora_path": "/no/such/adapter"}
    error = refused(server, "/v1/load_lora_adapter", missing)
    assert error["code"] == 404
    assert "ghost" in error["message"]
    assert "cannot be found" in refused(server, "/v1/unload_lora_adapter", {"lora_name": "ghost"})["message"]
    assert _error(server, server.model, None) < TOLERANCE
