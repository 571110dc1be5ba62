"""SGLang's ``/generate`` from its documents: flat and nested scores, shared candidates, tempered draws."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from tests.clients.toy import VOCAB, Toy, Wire
from topkd.clients.config import ClientConfig
from topkd.clients.dialects.sglang import ROUTE, Sglang
from topkd.topk.errors import AlignmentError, ResponseError, ServerBusyError, UnsupportedError
from topkd.topk.samples import SamplingParams

TOY = Toy(seed=2)
FAST = ClientConfig(backoff_s=0.0, max_retries=0, response_retries=0)
IDS = np.random.default_rng(5).integers(0, VOCAB, 14).tolist()
PROMPT = IDS[:4]


def b64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def meta(body: dict[str, Any], *, flat: bool = True, shift: int = 0) -> dict[str, Any]:
    """What the toy says to a request, ``shift`` rows out of place where a test wants it."""
    ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
    sampling = body["sampling_params"]
    if sampling["max_new_tokens"]:
        drawn = TOY.draw(ids, sampling["max_new_tokens"], temperature=sampling["temperature"], seed=3)
        rows = TOY.rows([*ids, *drawn])[len(ids) - 1 :]
        if sampling["temperature"] not in (0, 1):
            rows = rows / sampling["temperature"]
            rows = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        return {
            "output_token_logprobs": [[float(row[t]), t, None] for row, t in zip(rows, drawn, strict=True)],
            "output_top_logprobs": [[[lp, t, None] for t, lp in TOY.top(row, k)] for row in rows],
            "finish_reason": {"type": "length", "length": len(drawn)},
            "weight_version": "step-3",
        }
    rows = np.roll(TOY.rows(ids), shift, axis=0)[start:]
    actual = [[float(row[t]), t, None] for row, t in zip(rows, ids[start + 1 :], strict=True)]
    reply: dict[str, Any] = {"input_token_logprobs": [[None, ids[start], None], *actual], "finish_reason": None}
    if body.get("token_ids_logprob"):
        asked = body["token_ids_logprob"]
        reply["input_token_ids_logprobs"] = [None, *([[float(row[t]), t, None] for t in asked] for row in rows)]
    lists = [TOY.top(row, k) for row in rows]
    if flat and k:
        reply["input_top_logprobs_val_flat_b64"] = b64(np.array([[lp for _, lp in row] for row in lists], "<f4"))
        reply["input_top_logprobs_idx_flat_b64"] = b64(np.array([[t for t, _ in row] for row in lists], "<i4"))
        reply["input_top_logprobs_shape"], reply["input_top_logprobs_null_prefix"] = [len(lists), k], 1
    elif k:
        reply["input_top_logprobs"] = [None, *([[lp, t, None] for t, lp in row] for row in lists)]
    return reply


def server(change: Any = None, **options: Any) -> Wire:
    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if method == "GET":  # no facts: what the tests ask for is what the client was given
            return (200, {"data": [{"id": "t"}]}) if path == "/v1/models" else (404, {"detail": "Not Found"})
        assert path == ROUTE
        said = meta(body, **options)
        if change:
            change(said)
        one = {"text": "x", "meta_info": said}
        count = body["sampling_params"].get("n", 1)
        return 200, one if count == 1 else [one] * count

    return Wire(handler)


def client(wire: Wire, **options: Any) -> Sglang:
    return Sglang("http://h:1", model="t", config=FAST, transport=wire, vocab_size=VOCAB, **options)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("start", "k"), [(0, 5), (6, 1), (12, 60), (3, 0)])
async def test_a_score_is_the_models_own_rows_however_it_travels(flat: bool, start: int, k: int):
    wire = server(flat=flat)
    scores = await client(wire).score(IDS, start, k)
    rows = TOY.rows(IDS)[start:]
    np.testing.assert_array_equal(scores.actual_ids, IDS[start + 1 :])
    np.testing.assert_allclose(scores.actual_logp, rows[np.arange(len(rows)), IDS[start + 1 :]], atol=1e-6)
    np.testing.assert_array_equal(scores.ids, np.argsort(-rows, axis=1)[:, :k])
    np.testing.assert_allclose(scores.logp, -np.sort(-rows, axis=1)[:, :k], atol=1e-6)
    [body] = wire.bodies(ROUTE)
    assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0}
    assert (body["logprob_start_len"], body["input_ids"]) == (start, IDS), "ids go out; only the suffix comes back"


async def test_candidates_of_every_row_come_from_one_shared_list():
    rng = np.random.default_rng(1)
    asked = np.stack([rng.choice(VOCAB, 4, replace=False) for _ in range(10)]).astype(np.int32)
    asked[1, 2] = -1
    got = await client(server()).score_candidates(IDS, 3, asked)
    truth = np.take_along_axis(TOY.rows(IDS)[3:], np.maximum(asked, 0), axis=1)
    np.testing.assert_allclose(got, np.where(asked < 0, -np.inf, truth), atol=1e-6)


async def test_candidates_that_would_make_a_reply_of_gigabytes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("topkd.clients.dialects.sglang._UNION_CELLS", 100)
    asked = np.arange(40, dtype=np.int32).reshape(10, 4)
    with pytest.raises(UnsupportedError, match="10 rows x 40"):
        await client(server()).score_candidates(IDS, 3, asked)


@pytest.mark.parametrize("draws_by_seed", [False, True])
async def test_a_rollout_records_the_seed_that_was_sent_or_none(draws_by_seed: bool):
    wire = server()
    wire.handler = _with_facts(wire.handler, enable_deterministic_inference=draws_by_seed)
    rollouts = await client(wire).sample(PROMPT, 3, SamplingParams(4, seed=7))
    asked = [body["sampling_params"] for body in wire.bodies(ROUTE) if body["sampling_params"]["max_new_tokens"] == 4]
    sent = [sampling.get("sampling_seed") for sampling in asked]
    recorded = [rollout.sampling.seed for rollout in rollouts]
    if draws_by_seed:
        assert recorded == sent
        assert len(set(sent)) == 3, "copies of one seed would be equal"
    else:
        assert (sent, recorded) == ([None], [None, None, None])


def _with_facts(handler: Any, **facts: Any) -> Any:
    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        return (200, {"version": "0.5.23", **facts}) if path == "/server_info" else handler(method, path, body)

    return answer


async def test_draws_carry_exact_logprobs_the_list_and_the_weights_version():
    drawn = await client(server()).sample(PROMPT, 2, SamplingParams(8), k=4)
    assert len(drawn) == 2
    for rollout in drawn:
        rows = TOY.rows([*PROMPT, *rollout.completion_ids])[len(PROMPT) - 1 :]
        np.testing.assert_allclose(rollout.logp, rows[np.arange(8), rollout.completion_ids], atol=1e-6)
        assert rollout.topk is not None
        np.testing.assert_allclose(rollout.topk.logp, -np.sort(-rows, axis=1)[:, :4], atol=1e-6)
        assert rollout.version == "step-3"


async def test_a_tempered_draws_logprobs_are_unknown_though_a_number_is_served():
    [rollout] = await client(server()).sample(PROMPT, 1, SamplingParams(4, temperature=0.5))
    assert np.isnan(rollout.logp).all()


async def test_minus_infinity_is_zero_probability_in_a_list_and_refused_for_a_realised_token():
    def empty(said: dict[str, Any]) -> None:
        said["input_top_logprobs"][3][-1][0] = None
        said["input_top_logprobs"][4][-1][0] = -3.4e38

    up = client(server(empty, flat=False))
    scores = await up.score(IDS, 0, VOCAB)
    assert np.isneginf(scores.logp[2:4, -1]).all()
    assert up.metrics["zero_probability_sentinels"] == 2

    def hole(said: dict[str, Any]) -> None:
        said["input_token_logprobs"][2][0] = None

    with pytest.raises(ResponseError, match="null"):
        await client(server(hole)).score(IDS, 0, 5)


def _drop(key: str) -> Any:
    return lambda said: said.pop(key)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda said: said["input_token_logprobs"].pop(), AlignmentError),
        (lambda said: said["input_token_logprobs"].insert(1, [-1.0, 3, None]), AlignmentError),
        (
            lambda said: said["input_token_logprobs"][3].__setitem__(
                1, (said["input_token_logprobs"][3][1] + 1) % VOCAB
            ),
            AlignmentError,
        ),
        (_drop("input_token_logprobs"), ResponseError),
        (_drop("input_top_logprobs_idx_flat_b64"), ResponseError),
        (lambda said: said["input_top_logprobs_shape"].__setitem__(1, 6), AlignmentError),
        (
            lambda said: said.__setitem__(
                "input_top_logprobs_val_flat_b64", said["input_top_logprobs_val_flat_b64"][:-8]
            ),
            (AlignmentError, ResponseError),
        ),
        (
            lambda said: said.__setitem__(
                "finish_reason", {"type": "abort", "message": "queue full", "status_code": 503}
            ),
            ServerBusyError,
        ),
    ],
)
async def test_a_broken_score_is_refused(change: Any, error: Any):
    with pytest.raises(error):
        await client(server(change)).score(IDS, 0, 5)


@pytest.mark.parametrize("flat", [True, False])
async def test_lists_of_the_row_before_contradict_the_realised_tokens(flat: bool):
    def shifted(said: dict[str, Any]) -> None:
        if flat:
            for key, kind in (("val", "<f4"), ("idx", "<i4")):
                name = f"input_top_logprobs_{key}_flat_b64"
                array = np.frombuffer(base64.b64decode(said[name]), kind).reshape(-1, 60)
                said[name] = b64(np.roll(array, 1, axis=0))
        else:
            lists = said["input_top_logprobs"]
            said["input_top_logprobs"] = [None, lists[-1], *lists[1:-1]]

    with pytest.raises(AlignmentError, match="contradict"):
        await client(server(shifted, flat=flat)).score(IDS, 0, 60)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The embedded server in SGLang's words, and its model folder."""
    from tests.fakes.tinymodels import make_tiny_model
    from topkd.serve import ServeConfig, ServerProcess

    folder = tmp_path_factory.mktemp("sglang") / "model"
    make_tiny_model(folder, seed=1, std=0.25)
    config = ServeConfig(model=str(folder), served_model_name="t", port=0, max_model_len=512, dialect="sglang")
    with ServerProcess(config) as up:
        yield up.url, folder


async def test_the_embedded_server_and_the_client_agree_with_float64(served: Any):
    from tests.contract.reference import logp_rows

    url, folder = served
    ids = np.random.default_rng(3).integers(8, 2048, 50).tolist()
    exact = logp_rows(folder, ids)[:-1]
    async with Sglang(url, vocab_size=2048) as up:
        for start, k in ((0, 64), (30, 5), (48, 2048)):
            scores = await up.score(ids, start, k)
            np.testing.assert_allclose(scores.logp, -np.sort(-exact[start:], axis=1)[:, :k], atol=1e-4)
            realised = exact[start:][np.arange(scores.rows), ids[start + 1 :]]
            np.testing.assert_allclose(scores.actual_logp, realised, atol=1e-4)
        asked = np.random.default_rng(4).integers(0, 2048, (19, 6))
        got = await up.score_candidates(ids, 30, asked)
        np.testing.assert_allclose(got, np.take_along_axis(exact[30:], asked, axis=1), atol=1e-4)
        for rollout in await up.sample(ids, 2, SamplingParams(8, seed=1), k=5):
            rows = logp_rows(folder, [*ids, *rollout.completion_ids.tolist()])[len(ids) - 1 : -1]
            np.testing.assert_allclose(rollout.logp, rows[np.arange(rows.shape[0]), rollout.completion_ids], atol=1e-4)
            assert rollout.topk is not None
            np.testing.assert_allclose(rollout.topk.logp, -np.sort(-rows, axis=1)[:, :5], atol=1e-4)
        assert up.metrics["decoded_flat"] == 3
        assert (await up.server_info()).max_model_len == 505, "six tokens of the context are reserved"


async def test_the_probe_of_the_embedded_sglang_finds_what_it_can_do(served: Any):
    from topkd.clients.decoding.byte_map import load_bytemap
    from topkd.clients.probe.probe import probe

    url, folder = served
    report = await probe(url, student=load_bytemap(folder))
    assert report.dialect == "sglang"
    assert report.verdict.startswith("can teach: any K; scores candidates (shared)")
    has = report.capabilities
    assert (has.score_k, has.candidates, has.sample_temp, has.suffix_scoring) == (-1, "shared", "temperature", True)
    assert "disk" in has.sync
