"""Every recorded exchange of a real SGLang 0.5.23: read to its own numbers, refused by name, or never sent."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.toy import Wire
from tests.fakes.tinymodels import make_tiny_model
from topkd.clients.config import ClientConfig
from topkd.clients.decoding.sampled import SampleRequest
from topkd.clients.decoding.sglang import read_sglang_candidates, read_sglang_rollouts, read_sglang_scores
from topkd.clients.dialects.sglang import ROUTE, Sglang, build_sglang_sample, build_sglang_score
from topkd.clients.weights.sinks import SglangWeightSink
from topkd.topk.errors import (
    AlignmentError,
    ConfigError,
    ContextLimitError,
    ModelNotFoundError,
    RequestRefusedError,
    ResponseError,
    ServerBusyError,
    TopkdError,
)
from topkd.topk.protocols import WeightUpdate
from topkd.topk.samples import SamplingParams

FOLDER = Path(__file__).parents[2] / "golden" / "sglang-0.5.23"
CAPTURES: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))
}
VOCAB = 2048
ONCE = ClientConfig(max_retries=0, response_retries=0, backoff_s=0.0)


def _body(name: str) -> dict[str, Any]:
    body: dict[str, Any] = CAPTURES[name]["request"]["body"]
    return body


def _reply(name: str) -> Any:
    return CAPTURES[name]["response"]["json"]


def _is_score(name: str) -> bool:
    """Scores of one prompt in ids, answered in one piece."""
    request, response = CAPTURES[name]["request"], CAPTURES[name]["response"]
    body = request["body"]
    if request["path"] != ROUTE or response["status"] != 200 or not isinstance(body, dict):
        return False
    ids, start = body.get("input_ids"), body.get("logprob_start_len", -1)
    return (
        body.get("return_logprob") is True
        and isinstance(ids, list)
        and isinstance(ids[0], int)
        and isinstance(start, int)
        and 0 <= start < len(ids) - 1
        and not body.get("stream")
    )


NAN = {"nan_score", "nan_score_flat", "nan_sample"}
LAST_ID = {"gen_last_vocab_id", "gen_last_vocab_id_start"}
FATAL = {name for name, capture in CAPTURES.items() if capture["server_crashed"]}
SCORES = {name for name in CAPTURES if _is_score(name)} - NAN - LAST_ID - {"gen_flat_noB64"}
CANDIDATES = {"gen_token_ids", "gen_token_ids_flat", "gen_token_ids_start3_topk"}
DRAWS = {
    "err_n0", "sample_bias", "sample_minp", "sample_n3", "sample_presence_penalty", "sample_stop", "sample_stop_trim",
    "sample_topk2", "sample_topkd_body", "sample_topkd_body_again", "sample_topp", "sample_last_vocab_id",
}  # fmt: skip
REFUSED: dict[str, type[TopkdError]] = {
    "err_bad_json": RequestRefusedError, "err_bad_type": RequestRefusedError, "err_empty_ids": RequestRefusedError,
    "err_max_negative": RequestRefusedError, "err_temp_negative": RequestRefusedError, "err_topp0": RequestRefusedError,
    "gen_b64_noflat": RequestRefusedError, "gen_neither": RequestRefusedError, "gen_start_beyond": RequestRefusedError,
    "gen_token_ids_edge": RequestRefusedError, "sample_seed_out_of_range": RequestRefusedError,
    "sample_topk_0": RequestRefusedError, "vocab_discovery_logit_bias": RequestRefusedError,
    "vocab_discovery_token_ids": RequestRefusedError, "err_context_minus1": ContextLimitError,
    "err_context_plus_new": ContextLimitError, "err_exact_context": ContextLimitError,
    "err_too_long": ContextLimitError, "v1_completions_too_long": ContextLimitError,
    "lora_load_disabled": RequestRefusedError, "lora_unload_disabled": RequestRefusedError,
    "sync_10_pause_badmode": RequestRefusedError, "sync_11_pause_nobody": RequestRefusedError,
    "v1_chat_badrole": RequestRefusedError,
    "GET_mounted_release_memory_occupation": RequestRefusedError,
}  # fmt: skip
# Replies that no client of topkd asks for, each refused when it is read as the scores of one prompt.
NOT_OURS = {
    "err_one_id", "flat_last_only", "gen_batch", "gen_batch_lists", "gen_batch_one", "gen_start_last", "gen_start_len",
    "gen_start_minus1", "gen_text", "gen_text_batch", "gen_token_ids_batch", "gen_token_ids_batch_flatlist",
    "sample_stream", "sample_stream_score", "sample_nologprob", "sample_max0_nologprob", "flat_output", "gen_both",
    "sample_temp_tiny", "gen_flat_noB64",
}  # fmt: skip
MOUNTED = {name for name in CAPTURES if name.startswith("GET_mounted_")} - set(REFUSED)
ROUTES = {  # answers of other routes, used by the tests below or read by no client
    "detokenize", "tokenize", "flush_cache_post", "err_404", "get_get_load", "get_get_server_info",
    "get_get_weight_version", "get_health_generate", "get_metrics", "get_model_info", "get_server_info",
    "get_v1_models", "get_version",
    "get_weight_version", "nan_health", "span_abort_generation", "span_continue", "span_continue2", "span_pause",
    "span_pause_abort", "sync_12_continue_empty", "sync_13_update_weight_version", "sync_14_model_info",
    "sync_1_pause_retract", "sync_2_update_from_disk", "sync_3_model_info", "sync_5_continue_empty",
    "sync_8_model_info",
    "upd_back", "upd_nan_N", "upd_student_A", "upd_student_v2_B", "v1_chat", "v1_chat_n2", "v1_chat_top25",
    "v1_completions_badmodel", "v1_completions_echo1", "v1_completions_generates", "v1_completions_ids",
    "v1_completions_ids2", "v1_completions_logprobs0", "v1_completions_logprobs50", "v1_completions_prompt_logprobs",
    "v1_completions_stream", "span_long_generation",
}  # fmt: skip


def test_every_recorded_exchange_is_in_one_of_the_groups_below() -> None:
    groups = [NAN, LAST_ID, FATAL, SCORES, DRAWS, set(REFUSED), NOT_OURS, MOUNTED, ROUTES]
    assert len(CAPTURES) == 147
    assert set().union(*groups) == set(CAPTURES)
    assert sum(map(len, groups)) == len(CAPTURES), "each in one group"
    assert CANDIDATES <= SCORES


def _listed(meta: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logprobs of the lists as the reply writes them, flat or nested."""
    if "input_top_logprobs_val_flat_b64" in meta:
        rows, k = meta["input_top_logprobs_shape"]
        values = np.frombuffer(base64.b64decode(meta["input_top_logprobs_val_flat_b64"]), "<f4").reshape(rows, k)
        return np.frombuffer(base64.b64decode(meta["input_top_logprobs_idx_flat_b64"]), "<i4").reshape(rows, k), values
    lists = [row for row in meta.get("input_top_logprobs") or [] if row is not None]
    return np.array([[entry[1] for entry in row] for row in lists]), np.array([[e[0] for e in row] for row in lists])


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_recorded_score_is_read_to_its_own_numbers(name: str) -> None:
    body, reply = _body(name), _reply(name)
    ids, start, k = np.array(body["input_ids"], np.int32), body["logprob_start_len"], body.get("top_logprobs_num", 0)
    topk, _, flat = read_sglang_scores(json.dumps(reply).encode(), ids=ids, start=start, k=max(k, 0), vocab_size=VOCAB)
    meta = reply["meta_info"]
    np.testing.assert_array_equal(topk.actual_ids, ids[start + 1 :])
    np.testing.assert_allclose(topk.actual_logp, [entry[0] for entry in meta["input_token_logprobs"][1:]], rtol=1e-6)
    if k > 0:
        listed, logp = _listed(meta)
        np.testing.assert_array_equal(topk.ids, listed)
        np.testing.assert_allclose(topk.logp, logp, rtol=1e-6)
    assert flat == ("input_top_logprobs_val_flat_b64" in meta)


@pytest.mark.parametrize("name", sorted(CANDIDATES))
def test_recorded_candidates_are_read_in_the_requests_order(name: str) -> None:
    body, reply = _body(name), _reply(name)
    ids, start = np.array(body["input_ids"], np.int32), body["logprob_start_len"]
    union = np.unique(body["token_ids_logprob"]).astype(np.int32)
    got = read_sglang_candidates(json.dumps(reply).encode(), ids=ids, start=start, union=union)
    rows = [row for row in reply["meta_info"]["input_token_ids_logprobs"] if row is not None]
    want = [[{e[1]: e[0] for e in row}[int(token)] for token in union] for row in rows]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def _proved(name: str, *, off: float = 0.0) -> bytes:
    """The recorded reply with the last id scored beside, as the real server scores it when asked (by ``off`` wrong)."""
    reply = copy.deepcopy(_reply(name))
    meta = reply["meta_info"]
    rows = [[[entry[0] + off, VOCAB - 1, None]] for entry in meta["input_token_logprobs"][1:]]
    meta["input_token_ids_logprobs"] = [None, *rows]
    return json.dumps(reply).encode()


@pytest.mark.parametrize("name", sorted(LAST_ID))
def test_the_vocabularys_last_id_shown_as_zero_is_taken_by_its_value_alone(name: str) -> None:
    body = _body(name)
    ids, start, k = np.array(body["input_ids"], np.int32), body["logprob_start_len"], body["top_logprobs_num"]
    asked: dict[str, Any] = {"ids": ids, "start": start, "k": k, "vocab_size": VOCAB}
    topk, _, _ = read_sglang_scores(_proved(name), **asked, last_id=VOCAB - 1)
    np.testing.assert_array_equal(topk.actual_ids, ids[start + 1 :])
    np.testing.assert_allclose(
        topk.actual_logp, [entry[0] for entry in _reply(name)["meta_info"]["input_token_logprobs"][1:]], rtol=1e-6
    )
    if VOCAB - 1 in ids[start + 1 :]:  # entry 0 has no logprob that could be another token's
        with pytest.raises(AlignmentError, match="not that of the vocabulary's last id"):
            read_sglang_scores(_proved(name, off=0.01), **asked, last_id=VOCAB - 1)
        with pytest.raises(AlignmentError, match="not that of the vocabulary's last id"):  # the reply as recorded
            read_sglang_scores(json.dumps(_reply(name)).encode(), **asked, last_id=VOCAB - 1)
    with pytest.raises(AlignmentError, match="another prompt"):
        read_sglang_scores(json.dumps(_reply(name)).encode(), **asked)


@pytest.mark.parametrize("vocab_size", [VOCAB, None])
async def test_a_prompt_with_the_last_id_is_scored_with_its_proof(vocab_size: int | None) -> None:
    name = "gen_last_vocab_id"

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path != ROUTE:
            return 404, {"detail": "Not Found"}
        return 200, json.loads(_proved(name) if body.get("token_ids_logprob") == [VOCAB - 1] else _bytes(name))

    wire = Wire(handler)
    config = ONCE.model_copy(update={"response_retries": 1})  # the hidden id is no bad reply: it is not asked for twice
    teacher = Sglang("http://h:1", config=config, transport=wire, vocab_size=vocab_size)
    scores = await teacher.score(_body(name)["input_ids"], 0, 2)
    assert scores.actual_ids.tolist() == _body(name)["input_ids"][1:]
    assert len(wire.bodies(ROUTE)) == (1 if vocab_size else 2), "with the vocabulary known, one request has the proof"


def _bytes(name: str) -> bytes:
    return json.dumps(_reply(name)).encode()


@pytest.mark.parametrize("name", sorted(NAN))
def test_a_broken_models_numbers_are_refused(name: str) -> None:
    body = _body(name)
    ids, k = np.array(body["input_ids"], np.int32), body["top_logprobs_num"]
    asked = SampleRequest(ids, 1, SamplingParams(2), k, VOCAB, exact=True)
    read = {
        "nan_sample": lambda: read_sglang_rollouts(_bytes(name), asked=asked),
    }.get(name, lambda: read_sglang_scores(_bytes(name), ids=ids, start=0, k=k, vocab_size=VOCAB))
    with pytest.raises((ResponseError, AlignmentError)):
        read()


@pytest.mark.parametrize("name", sorted(DRAWS))
def test_a_recorded_draw_keeps_its_tokens_logprobs_and_weights_versions(name: str) -> None:
    body, reply = _body(name), _reply(name)
    fields = body["sampling_params"]
    n = max(fields.get("n", 1), 1)
    asked = SampleRequest(
        np.array(body["input_ids"], np.int32), n, SamplingParams(fields["max_new_tokens"]),
        body.get("top_logprobs_num", 0), VOCAB, exact=True,
    )  # fmt: skip
    rollouts = read_sglang_rollouts(json.dumps(reply).encode(), asked=asked)
    for rollout, one in zip(rollouts, reply if isinstance(reply, list) else [reply], strict=True):
        meta = one["meta_info"]
        assert rollout.completion_ids.tolist() == one["output_ids"]
        np.testing.assert_allclose(rollout.logp, [entry[0] for entry in meta["output_token_logprobs"]], rtol=1e-6)
        assert rollout.version == "+".join(dict.fromkeys(span["version"] for span in meta["weight_versions"]))


def test_an_aborted_draw_is_asked_again() -> None:
    body = _body("span_long_generation")
    asked = SampleRequest(np.array(body["input_ids"], np.int32), 1, SamplingParams(300), 0, VOCAB, exact=True)
    with pytest.raises(ServerBusyError, match="aborted"):
        read_sglang_rollouts(_bytes("span_long_generation"), asked=asked)


def test_a_draw_that_spans_an_update_names_both_versions() -> None:
    reply = _reply("sample_topkd_body")
    spans = [{"version": "A", "start": 0, "end": 2}, {"version": "B", "start": 2, "end": 4}]
    reply = reply | {"meta_info": reply["meta_info"] | {"weight_version": "B", "weight_versions": spans}}
    body = _body("sample_topkd_body")
    asked = SampleRequest(np.array(body["input_ids"], np.int32), 1, SamplingParams(4), 3, VOCAB, exact=True)
    [rollout] = read_sglang_rollouts(json.dumps(reply).encode(), asked=asked)
    assert rollout.version == "A+B"


@pytest.mark.parametrize("name", sorted(REFUSED))
async def test_a_recorded_refusal_is_its_typed_error(name: str) -> None:
    response = CAPTURES[name]["response"]
    wire = Wire(lambda *_: (response["status"], response["json"]))
    client = Sglang("http://h:1", config=ONCE, transport=wire, vocab_size=VOCAB)
    with pytest.raises(REFUSED[name]) as caught:
        await client.endpoint.call("POST", ROUTE, {}, decode=lambda reply: reply, where="")
    assert type(caught.value) is REFUSED[name]


@pytest.mark.parametrize("name", sorted(NOT_OURS))
def test_a_reply_of_another_shape_is_refused_when_it_is_read_as_ours(name: str) -> None:
    """As scores of the prompt from its first token: each lacks them, and none becomes numbers."""
    response = CAPTURES[name]["response"]
    body = json.dumps(response["json"]).encode() if response["json"] is not None else response["text"].encode()
    ids = np.array([5, 100, 200, 300, 17, 900, 1500, 42], np.int32)
    with pytest.raises(TopkdError):
        read_sglang_scores(body, ids=ids, start=0, k=2, vocab_size=VOCAB)


def _recorded_server() -> Wire:
    """The recorded server's facts; every request for tokens is an error of the test."""
    answers = {
        "/server_info": "get_server_info", "/v1/models": "get_v1_models", "/model_info": "get_model_info",
        "/version": "get_version",
    }  # fmt: skip

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path in answers:
            response = CAPTURES[answers[path]]["response"]
            return response["status"], response["json"]
        if path == ROUTE and body.get("token_ids_logprob") == [2**31 - 1]:
            response = CAPTURES["vocab_discovery_token_ids"]["response"]
            return response["status"], response["json"]
        raise AssertionError(f"{method} {path} {body}: this would have reached the server")

    return Wire(handler)


async def test_the_vocabulary_and_the_longest_prompt_are_learnt_without_computing_anything() -> None:
    wire = _recorded_server()
    client = Sglang("http://h:1", model="t", config=ONCE, transport=wire)
    facts, info = await client.facts(), await client.server_info()
    assert (facts.vocab_size, facts.version, facts.draws_by_seed) == (VOCAB, (0, 5, 23), False)
    assert (info.model, info.max_model_len, info.version) == ("t", 505, "0.5.23")
    await client.facts()
    assert len(wire.bodies(ROUTE)) == 1, "asked once"


async def test_a_model_that_a_reload_renamed_is_still_the_one_that_was_named() -> None:
    recorded = _recorded_server()

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "/models/version-3", "parent": None, "max_model_len": 512}]}
        return recorded.handler(method, path, body)

    client = Sglang("http://h:1", model="t", config=ONCE, transport=Wire(handler))
    assert (await client.server_info()).model == "t"
    with pytest.raises(ModelNotFoundError, match="no model 'other'"):
        await Sglang("http://h:1", model="other", config=ONCE, transport=Wire(handler)).server_info()


@pytest.mark.parametrize("name", sorted(FATAL))
async def test_a_request_that_ended_the_real_server_is_never_sent(name: str) -> None:
    body, wire = _body(name), _recorded_server()
    client = Sglang("http://h:1", model="t", config=ONCE, transport=wire)
    ids, k = body["input_ids"], body.get("top_logprobs_num", 0)
    if name in {"gen_kvocab_plus", "gen_k_huge"}:  # K is cut to the vocabulary: all there is, as asked
        sent: list[Any] = []

        def handler(method: str, path: str, asked: Any) -> tuple[int, Any]:
            if path == ROUTE and asked.get("token_ids_logprob") != [2**31 - 1]:
                sent.append(asked["top_logprobs_num"])
                return 200, _reply("gen_kvocab")
            return wire.handler(method, path, asked)

        whole = await Sglang("http://h:1", model="t", config=ONCE, transport=Wire(handler)).score(ids, 0, k)
        assert (sent, whole.k) == ([VOCAB], VOCAB)
        return
    with pytest.raises(TopkdError, match=r"vocabulary|id|flat|empty"):
        await client.score(ids, 0, k)
    assert [asked.get("token_ids_logprob") for asked in wire.bodies(ROUTE)] in ([], [[2**31 - 1]])


@pytest.mark.parametrize("vocab_size", [None, VOCAB, 2 * VOCAB])
async def test_a_vocabulary_that_is_given_too_large_lets_nothing_fatal_through(vocab_size: int | None) -> None:
    client = Sglang("http://h:1", model="t", config=ONCE, transport=_recorded_server(), vocab_size=vocab_size)
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        await client.score([5, VOCAB, 7], 0, 1)
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        await client.sample([5, VOCAB, 7], 1, SamplingParams(2))


async def test_where_the_vocabulary_cannot_be_learnt_a_large_k_is_refused_and_no_probe_is_sent() -> None:
    """Before 0.5.15 the question itself would have run."""
    info = _reply("get_server_info") | {"version": "0.5.12"}

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/server_info":
            return 200, info
        if path == "/v1/models":
            return 200, _reply("get_v1_models")
        raise AssertionError(f"{path} {body}")

    client = Sglang("http://h:1", model="t", config=ONCE, transport=Wire(handler))
    with pytest.raises(ConfigError, match="K above the vocabulary"):
        await client.score([5, 100, 200], 0, 4096)


async def test_a_full_push_leaves_the_server_running_and_confirms_the_version(tmp_path: Path) -> None:
    steps = {
        "/pause_generation": "sync_1_pause_retract", "/update_weights_from_disk": "sync_2_update_from_disk",
        "/model_info": "sync_3_model_info", "/continue_generation": "sync_5_continue_empty",
    }  # fmt: skip

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path in steps:
            if method == "POST" and body is None:
                return 400, _reply("sync_11_pause_nobody")
            return 200, _reply(steps[path])
        assert (path, body["sampling_params"]["max_new_tokens"]) == (ROUTE, 1)
        return 200, _reply("err_n0")

    wire = Wire(handler)
    sink = SglangWeightSink("http://h:1", model="s", config=ONCE, transport=wire)
    folder = make_tiny_model(tmp_path / "weights")
    assert await sink.push(WeightUpdate(path=str(folder), version="v2", kind="full")) == "v2"
    posts = [path for method, path, _ in wire.seen if method == "POST"]
    assert posts == ["/pause_generation", "/update_weights_from_disk", "/continue_generation", ROUTE]
    assert sink.sampling_model == "s", "the name it was given, not the folder that the server now calls its model"


def test_requests_carry_no_seed_of_their_own_and_the_adapter_by_name() -> None:
    ids = np.array([5, 6], np.int32)
    body = build_sglang_sample(ids, SamplingParams(4), 1, 2, adapter="s@1")
    assert "sampling_seed" not in body["sampling_params"]
    assert body["lora_path"] == "s@1"
    assert build_sglang_score(ids, 0, 2, adapter="s@1")["lora_path"] == "s@1"
    assert "lora_path" not in build_sglang_score(ids, 0, 2)
