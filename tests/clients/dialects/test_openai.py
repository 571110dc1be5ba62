"""Chat completions: ids by the tokenizer's own bytes, what cannot be told left out and counted, and no teaching."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.clients.toy import scripted
from topkd.clients.config import ClientConfig
from topkd.clients.decoding.byte_map import ByteMap, load_bytemap, read_byte_map
from topkd.clients.dialects.openai import ROUTE, OpenAIChat
from topkd.topk.errors import AlignmentError, ConfigError, KLimitError, ResponseError, UnsupportedError
from topkd.topk.samples import SamplingParams

GOLDEN = Path(__file__).parents[2] / "golden"
FAST = ClientConfig(max_retries=0)
MESSAGES = [{"role": "user", "content": "def get"}]


def capture(path: str) -> dict[str, Any]:
    return dict(json.loads((GOLDEN / path).read_text())["response"]["body"])


def byte_level(pieces: dict[str, int], added: dict[str, int] | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token=next(iter(pieces))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(added or ()))
    return tokenizer


@pytest.fixture
def table() -> ByteMap:
    """ids of the words that the captures show (the recorded vocabulary itself is not kept)."""
    names = [" a", "chars", "CH", " fa", "stack", " format", "&", "an", "X", "root", "unk", "\n", "é"]
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return read_byte_map(byte_level({alphabet.pre_tokenize_str(name)[0][0]: at for at, name in enumerate(names)}))


def entry(token: str, logprob: float, **more: Any) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()), **more}


def reply(*positions: dict[str, Any], text: str | None = None, finish: str = "length", **top: Any) -> dict[str, Any]:
    spelt = "".join(position["token"] for position in positions) if text is None else text
    choice = {"index": 0, "message": {"role": "assistant", "content": spelt}, "finish_reason": finish}
    return {"choices": [choice | {"logprobs": {"content": list(positions)}}], **top}


def client(*replies: Any, **options: Any) -> OpenAIChat:
    return OpenAIChat("http://h:1", model="t", config=FAST, transport=scripted(*replies), **options)


async def draw(up: OpenAIChat, *, k: int = 0, tokens: int = 8, prompt: int = 5, **params: Any) -> Any:
    return await up.chat(MESSAGES, 1, SamplingParams(tokens, seed=1, **params), prompt_ids=list(range(prompt)), k=k)


async def test_a_recorded_chat_of_a_real_vllm_is_read_by_its_bytes(table: ByteMap):
    body = capture("vllm-0.32.0/c1_chat_top_logprobs.json")
    up = client(body, tokenizer=table)
    [rollout] = await draw(up, k=3, prompt=body["usage"]["prompt_tokens"])
    content = body["choices"][0]["logprobs"]["content"]
    assert rollout.completion_ids.tolist() == [1, 6, 7], "chars, & and an in the table"
    np.testing.assert_allclose(rollout.logp, [position["logprob"] for position in content], rtol=1e-6)
    assert rollout.topk.ids[0].tolist() == [1, 2, 3], "chars, CH, ' fa'"
    np.testing.assert_allclose(rollout.topk.logp[0], [t["logprob"] for t in content[0]["top_logprobs"][:3]], rtol=1e-6)
    assert up.metrics["listed_entries"] == 15
    assert up.metrics["ambiguous_entries"] > 0, "the table lacks most of the recorded vocabulary"


async def test_a_recorded_chat_of_llama_cpp_is_read_by_its_ids_without_a_tokenizer():
    body = capture("llama-cpp/ll_c1_chat_logprobs.json")
    [rollout] = await draw(client(body), k=4, prompt=body["usage"]["prompt_tokens"])
    content = body["choices"][0]["logprobs"]["content"]
    assert rollout.completion_ids.tolist() == [position["id"] for position in content]
    assert rollout.topk.ids[0].tolist() == [top["id"] for top in content[0]["top_logprobs"][:4]]
    np.testing.assert_allclose(rollout.topk.logp[0], [t["logprob"] for t in content[0]["top_logprobs"][:4]], rtol=1e-6)


async def test_a_chat_that_a_paused_server_aborted_is_asked_for_again():
    position = {"token": "token_id:7", "logprob": -0.5, "bytes": None}
    no_is_paused = 404, {"detail": "Not Found"}
    up = client(reply(position, text="", finish="abort"), no_is_paused, reply(position, text=""))
    [rollout] = await draw(up)
    assert rollout.completion_ids.tolist() == [7]
    assert (up.metrics["tries"], up.metrics["pauses"]) == (2, 1)


async def test_names_like_token_id_7_are_ids():
    body = reply({"token": "token_id:7", "logprob": -0.5, "bytes": None}, text="")
    [rollout] = await draw(client(body))
    assert rollout.completion_ids.tolist() == [7]


async def test_a_list_is_cut_before_its_first_ambiguous_entry_and_the_cut_is_counted(table: ByteMap):
    top = [entry("chars", -0.5), entry("a�", -1.5, bytes=[0xC3]), entry("CH", -2.5)]
    up = client(reply(entry("chars", -0.5, top_logprobs=top)), tokenizer=table)
    [rollout] = await draw(up, k=3)
    assert rollout.topk.ids[0].tolist() == [1, -1, -1]
    assert up.metrics["ambiguous_entries"] == 1
    assert up.metrics["listed_entries"] == 3
    assert rollout.topk.ceiling()[0] >= np.exp(-1.5), "the bound on an absent id holds for the one that was cut"
    assert rollout.topk.tail_logp[0] == pytest.approx(np.log1p(-np.exp(-0.5)), rel=1e-5)


async def test_vllms_list_with_the_sampled_token_in_front_keeps_only_what_is_without_a_gap(table: ByteMap):
    top = [entry("X", -6.0), entry("chars", -0.5), entry("CH", -2.0), entry("an", -2.5)]
    [rollout] = await draw(client(reply(entry("X", -6.0, top_logprobs=top)), tokenizer=table), k=4)
    assert rollout.topk.ids[0].tolist() == [1, 2, 7, -1]
    assert rollout.topk.actual_ids.tolist() == [8]


async def test_a_draw_with_an_ambiguous_token_is_left_out_and_counted_never_guessed():
    twice = read_byte_map(byte_level({"x": 0, "a": 1}))
    ambiguous = ByteMap({**twice.token_bytes, 2: b"a"}, frozenset(), twice.tokenizer)
    body = reply(entry("a", -0.5))
    body["choices"].append(reply(entry("x", -0.25))["choices"][0] | {"index": 1})
    up = client(body, tokenizer=ambiguous)
    [rollout] = await up.chat(MESSAGES, 2, SamplingParams(4), prompt_ids=[1])
    assert rollout.completion_ids.tolist() == [0]
    assert up.metrics["ambiguous_rollouts"] == 1


async def test_a_token_without_an_entry_of_its_own_is_noticed_in_the_text(table: ByteMap):
    """llama.cpp lists no entry for a token that ends inside a character: the ids would silently be one short."""
    body = reply(entry("chars", -0.5), entry("X", -1.0), text="chars日X")
    with pytest.raises(AlignmentError, match="spell"):
        await draw(client(body, tokenizer=table))


async def test_the_servers_count_of_prompt_tokens_must_be_ours(table: ByteMap):
    body = reply(entry("chars", -0.5), usage={"prompt_tokens": 6})
    with pytest.raises(AlignmentError, match="chat template"):
        await draw(client(body, tokenizer=table), prompt=5)


async def test_inexact_draws_have_unknown_logprobs(table: ByteMap):
    [rollout] = await draw(client(reply(entry("X", -1.0)), tokenizer=table), temperature=0.7)
    assert np.isnan(rollout.logp).all()


async def test_defaults_of_local_servers_are_overruled_and_hosted_ones_get_no_unknown_field(table: ByteMap):
    local = client(reply(entry("X", -1.0)), tokenizer=table)
    await draw(local, k=3)
    [body] = local.endpoint._transport.bodies(ROUTE)
    assert (body["top_k"], body["min_p"], body["temperature"], body["top_p"], body["top_logprobs"]) == (
        0,
        0.0,
        1.0,
        1.0,
        4,
    )
    hosted = OpenAIChat(
        "https://api.openai.com/v1",
        model="m",
        tokenizer=table,
        config=FAST,
        transport=scripted(reply(entry("X", -1.0))),
    )
    await draw(hosted)
    [body] = hosted.endpoint._transport.bodies(ROUTE)
    assert not {"top_k", "min_p", "repetition_penalty", "max_tokens", "stop_token_ids"} & set(body)
    with pytest.raises(ConfigError, match="top_k"):
        await hosted.chat(MESSAGES, 1, SamplingParams(4, top_k=5), prompt_ids=[1])


@pytest.mark.parametrize("ids", [[], [1.5], [2**40], [-1], [[1]], ["1"]], ids=repr)
async def test_a_prompt_that_is_no_list_of_ids_is_refused_unrounded_before_anything_is_sent(ids: Any):
    up = client()
    with pytest.raises(ConfigError, match=r"flat, non-empty sequence of token ids|token id outside"):
        await up.chat(MESSAGES, 1, SamplingParams(4), prompt_ids=ids)


async def test_it_cannot_teach_and_says_why():
    up = client()
    with pytest.raises(UnsupportedError, match="generated tokens only"):
        await up.score([1, 2, 3], 0, 5)
    with pytest.raises(UnsupportedError, match="messages"):
        await up.sample([1, 2, 3], 1, SamplingParams(4))
    with pytest.raises(KLimitError, match="K <= 20"):
        await draw(up, k=21)


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"index": 0, "finish_reason": "stop", "logprobs": None}]},
        {"choices": []},
        reply(entry("X", 0.5)),
        reply({"token": "X", "logprob": None, "bytes": [88]}),
        reply(entry("X", -1.0), finish="tool_calls"),
        reply(entry("X", -0.1, top_logprobs=[entry("chars", -0.1), entry("CH", -0.1)])),
    ],
)
async def test_replies_that_cannot_be_right_are_refused(table: ByteMap, body: dict[str, Any]):
    with pytest.raises(ResponseError):
        await draw(client(body, tokenizer=table), k=2)


def test_a_byte_level_table_spells_every_byte_and_the_special_tokens():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = read_byte_map(byte_level({piece: at for at, piece in enumerate(alphabet)}, {"<|end|>": 256}))
    assert sorted(spelt for token, spelt in table.token_bytes.items() if token < 256) == [
        bytes([b]) for b in range(256)
    ]
    assert table.token_bytes[256] == b"<|end|>"
    assert table.special == {256}
    assert table.only_id(b"\xff") is not None


def test_a_sentencepiece_table_knows_spaces_and_byte_tokens_and_its_ambiguities():
    pieces = [("<unk>", 0.0), ("▁the", -1.0), ("a", -2.0), ("<0x61>", -3.0), ("<0xE6>", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    table = read_byte_map(tokenizer)
    assert table.token_bytes[1] == b" the"
    assert table.token_bytes[4] == b"\xe6"
    assert table.ids_of[b"a"] == (2, 3)
    assert table.only_id(b"a") is None
    assert table.only_id(b" the") == 1


def test_a_tokenizer_that_is_not_there_or_of_no_known_kind_is_one_clear_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_bytemap(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_bytemap(tmp_path)
    with pytest.raises(ConfigError, match="neither"):
        read_byte_map(Tokenizer(models.WordPiece({"a": 0}, unk_token="a")))


async def test_draws_of_the_embedded_server_are_read_back_as_the_ids_it_drew(tmp_path: Path):
    from transformers import AutoTokenizer

    from tests.contract.reference import logp_rows
    from tests.fakes.tinymodels import make_tiny_model
    from topkd.serve import ServeConfig, ServerProcess

    folder = tmp_path / "model"
    make_tiny_model(folder, seed=1, std=0.25)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    with ServerProcess(ServeConfig(model=str(folder), served_model_name="t", port=0, max_model_len=256)) as up:
        async with OpenAIChat(up.url, tokenizer=folder) as client:
            kept = await client.chat(MESSAGES, 6, SamplingParams(6, seed=3), prompt_ids=prompt, k=4)
            lost = client.metrics["ambiguous_rollouts"]
    assert len(kept) + lost == 6
    for rollout in kept:
        assert rollout.version == "default"
        rows = logp_rows(folder, [*prompt, *rollout.completion_ids.tolist()])[len(prompt) - 1 :]
        realised = rows[np.arange(rollout.completion_ids.size), rollout.completion_ids]
        np.testing.assert_allclose(rollout.logp, realised, atol=1e-4)
        known = rollout.topk.ids >= 0
        best = -np.sort(-rows[: rollout.completion_ids.size], axis=1)[:, :4]
        np.testing.assert_allclose(rollout.topk.logp[known], best[known], atol=1e-4)
