"""Faults of binary replies over loopback: vLLM's candidate matrix and SGLang's flat lists, once and for good."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.clients.dialects import test_sglang as sglang
from tests.clients.probing import served
from tests.clients.toy import VOCAB, npy
from tests.clients.vllm_toy import VllmToy
from topkd.clients import ClientConfig, Sglang, VllmGenerate
from topkd.topk.errors import AlignmentError, ResponseError, TopkdError

QUICK = ClientConfig(max_retries=3, response_retries=1, backoff_s=0.01, backoff_max_s=0.02, total_timeout_s=120.0)
MODELS = {"object": "list", "data": [{"id": "t", "max_model_len": 256}]}
IDS = np.random.default_rng(6).integers(0, VOCAB, 12)
WANTED = np.stack([np.random.default_rng(row).permutation(VOCAB)[:3] for row in range(len(IDS) - 1)]).astype(np.int32)


def _raw(matrix: np.ndarray) -> str:
    out = io.BytesIO()
    np.save(out, matrix)
    return base64.b64encode(out.getvalue()).decode()


def _matrix(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)))


def _holed(matrix: np.ndarray) -> np.ndarray:
    out = matrix.copy()
    out[1, 1] = np.nan
    return out


# fault -> (what becomes of the field, the error when it stays so)
MATRIX: dict[str, tuple[Callable[[str], Any], type[TopkdError]]] = {
    "null": (lambda _: None, ResponseError),
    "float64": (lambda text: _raw(_matrix(text).astype("<f8")), ResponseError),
    "big_endian": (lambda text: _raw(_matrix(text).astype(">f4")), ResponseError),
    "integers": (lambda text: _raw(_matrix(text).astype("<i4")), ResponseError),
    "fortran_order": (lambda text: _raw(np.asfortranarray(_matrix(text))), ResponseError),
    "row_short": (lambda text: npy(_matrix(text)[:-1]), AlignmentError),
    "row_long": (lambda text: npy(np.vstack([_matrix(text), _matrix(text)[-1:]])), AlignmentError),
    "k_minus_1": (lambda text: npy(_matrix(text)[:, :-1]), AlignmentError),
    "another_axis": (lambda text: npy(_matrix(text)[None]), AlignmentError),
    "cut_off": (lambda text: base64.b64encode(base64.b64decode(text)[:-4]).decode(), AlignmentError),
    "longer_than_said": (lambda text: base64.b64encode(base64.b64decode(text) + b"\0" * 4).decode(), AlignmentError),
    "no_base64": (lambda text: "?" + text[1:], ResponseError),
    "no_npy": (lambda _: base64.b64encode(b"not numpy at all").decode(), ResponseError),
    "nan": (lambda text: npy(_holed(_matrix(text))), ResponseError),
    "above_0": (lambda text: npy(-_matrix(text)), ResponseError),
    "mass_above_1": (lambda text: npy(np.full_like(_matrix(text), -0.4)), ResponseError),
}


def _b64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _changed(name: str, kind: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any]], None]:
    def harm(said: dict[str, Any]) -> None:
        field = f"input_top_logprobs_{name}_flat_b64"
        said[field] = _b64(change(np.frombuffer(base64.b64decode(said[field]), kind)))

    return harm


def _shape(said: dict[str, Any]) -> None:
    said["input_top_logprobs_shape"] = said["input_top_logprobs_shape"][::-1]


def _shifted(said: dict[str, Any]) -> None:
    said["input_token_logprobs"] = [*said["input_token_logprobs"][1:], said["input_token_logprobs"][-1]]


FLAT: dict[str, tuple[Callable[[dict[str, Any]], None], type[TopkdError]]] = {
    "float64": (_changed("val", "<f4", lambda flat: flat.astype("<f8")), AlignmentError),
    "short_values": (_changed("val", "<f4", lambda flat: flat[:-1]), AlignmentError),
    "short_ids": (_changed("idx", "<i4", lambda flat: flat[:-5]), AlignmentError),
    "nan": (_changed("val", "<f4", lambda flat: np.where(np.arange(flat.size) == 3, np.nan, flat)), ResponseError),
    "negative_id": (_changed("idx", "<i4", lambda flat: -flat - 1), ResponseError),
    "past_vocab": (_changed("idx", "<i4", lambda flat: flat + VOCAB), ResponseError),
    "duplicate_ids": (_changed("idx", "<i4", np.zeros_like), ResponseError),
    "mass_above_1": (_changed("val", "<f4", lambda flat: np.full_like(flat, -0.3)), ResponseError),
    "shape_turned": (_shape, AlignmentError),
    "tokens_shifted": (_shifted, AlignmentError),
}


async def _once_and_for_good(
    handler: Callable[[bool], Any], make: Any, ask: Callable[[Any], Any], truth: np.ndarray, kind: type[TopkdError]
) -> None:
    """A fault that passes is recovered from; one that stays is ``kind``; the client lives on, and nothing is left."""
    faults: list[bool] = []

    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        if method == "GET":
            return (200, MODELS) if path == "/v1/models" else handler(False)(method, path, body)
        return handler(faults.pop(0) if faults else False)(method, path, body)

    with served(answer) as url:
        async with make(url, config=QUICK, vocab_size=VOCAB) as client:
            await client.model_name()
            faults[:] = [True]
            np.testing.assert_allclose(await ask(client), truth, atol=1e-5)
            assert client.metrics["retries"] == 1
            faults[:] = [True] * 8
            async with asyncio.timeout(240):
                with pytest.raises(kind) as caught:
                    await ask(client)
            assert type(caught.value) is kind, caught.value
            assert url in str(caught.value), "the message names the endpoint"
            assert len(faults) == 6, "a reply that fails its checks is asked for again once"
            faults.clear()
            np.testing.assert_allclose(await ask(client), truth, atol=1e-5)
            assert client.endpoint.gate.window.in_flight == client.endpoint.gate.budget.used == 0
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left, left


@pytest.mark.parametrize("fault", MATRIX)
async def test_a_bad_matrix_of_candidates_is_asked_for_again_and_one_that_stays_is_a_typed_error(fault: str):
    change, kind = MATRIX[fault]
    toy = VllmToy()

    def handler(harmed: bool) -> Any:
        def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
            status, reply = toy(method, path, body)
            if harmed:
                reply = json.loads(json.dumps(reply))
                reply["prompt_token_id_logprobs"] = change(reply["prompt_token_id_logprobs"])
            return status, reply

        return answer

    truth = np.take_along_axis(toy.toy.rows(IDS), WANTED, axis=1)
    await _once_and_for_good(handler, VllmGenerate, lambda client: client.score_candidates(IDS, 0, WANTED), truth, kind)


@pytest.mark.parametrize("fault", FLAT)
async def test_a_bad_flat_list_is_asked_for_again_and_one_that_stays_is_a_typed_error(fault: str):
    change, kind = FLAT[fault]
    fair, foul = sglang.server(), sglang.server(change)
    truth = -np.sort(-sglang.TOY.rows(IDS)[2:], axis=1)[:, :5]

    def handler(harmed: bool) -> Any:
        return foul.handler if harmed else fair.handler

    async def ask(client: Sglang) -> np.ndarray:
        return (await client.score(IDS, 2, 5)).logp

    await _once_and_for_good(handler, Sglang, ask, truth, kind)
