"""Structure-aware fuzz: whatever is done to a reply, the answer is a valid TopK or a typed error, and readings agree.

Mutations work on the JSON text (bytes cut, doubled, swapped, numbers and keys replaced by nastier ones) and on its
structure (rows and entries dropped, repeated, moved between rows). What a mutation cannot change unseen is the
alignment: an accepted reply scores the tokens that were sent.
"""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest

from tests.clients.replies import score_body, score_rows
from topkd.clients.decoding import vllm as decode
from topkd.clients.decoding import vllm_numba as decode_numba
from topkd.clients.decoding import vllm_numpy as decode_numpy
from topkd.clients.decoding.binary import read_flat_lists, read_npy_matrix
from topkd.clients.decoding.sampled import SampleRequest, read_sampled_rollouts
from topkd.clients.http.status_errors import error_from_reply
from topkd.clients.http.transport import Reply
from topkd.topk.errors import ServerBusyError, ServerError, TopkdError
from topkd.topk.samples import SamplingParams
from topkd.topk.types import MASS_TOLERANCE

VOCAB = 512
NUMBERS = [
    b"NaN", b"Infinity", b"-Infinity", b"null", b"true", b'"x"', b"1e999", b"-1e999", b"1e-999", b"-0", b"0.0",
    b"-9999.0",
    b"-99999", b"-3.4e38", b"3.4028235e38", b"99999999999999999999999999", b"-1", b"2147483648", b"4294967296", b"007",
    b"1.5", b"-1.5e-7", b"-12.", b".5", b"+1", b"-", b"1e5", b"{}", b"[]", b"-1234.5", b"-123456.75", b"0x10", b"",
]  # fmt: skip
PIECES = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"null,", b'"5":{"logprob":-1.0,"rank":1,"decoded_token":"a"},',
    b'":{"logprob":', b',"rank":', b"}},{", b"\x00", b"\xff\xfe", b"\\u0000", b" ", b"\n", b'"prompt_logprobs":[', b"-",
    b"0",
]  # fmt: skip


def _seeds() -> list[tuple[bytes, np.ndarray, int]]:
    out = []
    for length, k, seed in ((3, 1, 1), (9, 4, 2), (40, 5, 3), (70, 8, 4)):
        ids, rows = score_rows(length, k, seed=seed, vocab=VOCAB)
        out.append((score_body(ids, rows), ids, k))
    return out


SEEDS = _seeds()


def mutate_text(body: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not body:
            break
        at = rng.randrange(len(body))
        match rng.randrange(8):
            case 0:
                body = body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :]
            case 1:
                body = body[:at] + body[at + rng.randrange(1, 60) :]
            case 2:
                body = body[:at] + rng.choice(PIECES) + body[at:]
            case 3:
                body = body[:at]
            case 4:
                other = rng.randrange(len(body))
                body = body[:at] + body[other : other + rng.randrange(1, 80)] + body[at:]
            case 5 | 6:  # a number becomes another
                digits = [i for i in range(at, min(at + 80, len(body))) if body[i : i + 1].isdigit()]
                if digits:
                    end = digits[0]
                    while end < len(body) and body[end : end + 1] in b"0123456789.e-":
                        end += 1
                    body = body[: digits[0]] + rng.choice(NUMBERS) + body[end:]
            case 7:
                keys = (
                    b"logprob",
                    b"rank",
                    b"decoded_token",
                    b"prompt_logprobs",
                    b"choices",
                    b"index",
                    b"prompt_token_ids",
                )
                key = rng.choice(keys)
                body = body.replace(key, rng.choice((*keys, b"x", b"")), rng.choice((1, 1, -1)))
    return body


def mutate_structure(body: bytes, rng: random.Random) -> bytes:
    reply = json.loads(body)
    choice = reply["choices"][0]
    rows = choice["prompt_logprobs"]
    i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
    match rng.randrange(11):
        case 0:
            del rows[i]
        case 1:
            rows.insert(i, rows[j])
        case 2:
            rows[i], rows[j] = rows[j], rows[i]
        case 3:
            rows[i] = rng.choice([None, {}, [], 0, "x", {"5": None}, {"x": {"logprob": -1}}])
        case 4:
            if rows[i]:
                del rows[i][rng.choice(list(rows[i]))]
        case 5:
            if rows[i]:
                rows[i][str(rng.choice((0, 7, VOCAB, 10**9, 10**12, 10**25, -3)))] = rng.choice(list(rows[i].values()))
        case 6:
            if rows[i]:
                entry = rng.choice(list(rows[i].values()))
                entry["logprob"] = rng.choice([None, 0.5, -9999.0, -1e-9, 0, -0.0, 1e308, -1e308, "x", True, 10**40])
        case 7:
            if rows[i]:
                rng.choice(list(rows[i].values()))["rank"] = rng.choice([0, -1, 1, 2, 10**12, None, 1.5, "1", 10**30])
        case 8:
            if rows[i]:
                items = list(rows[i].items())
                rng.shuffle(items)
                rows[i] = dict(items)
        case 9:
            choice[rng.choice(list(choice))] = rng.choice([None, [], {}, 1, "x", [None], [[1]], 10**30])
        case 10:
            reply = rng.choice([[], None, {"choices": [choice, choice]}, {"choices": {}}, {"error": {"message": "m"}}])
    indent = rng.choice((None, None, None, 1))
    return json.dumps(reply, indent=indent, separators=None if indent else (",", ":")).encode()


def check_score(body: bytes, ids: np.ndarray, start: int, k: int) -> str:
    """One reply through all readings; "valid" or the class of the error."""
    outcomes = {}
    readers = {"typed": lambda *a: None, "numpy": decode_numpy.read_rows}
    if decode_numba.available():
        readers["numba"] = decode_numba.read_rows_compiled
    for name, read in readers.items():
        try:
            outcomes[name] = _with(read, body, ids, start, k)
        except TopkdError as error:
            outcomes[name] = error
    assert not any("\n" in str(o) for o in outcomes.values() if isinstance(o, TopkdError))
    answers = [o for o in outcomes.values() if not isinstance(o, TopkdError)]
    for topk, zeros in answers:
        assert (topk, zeros) == answers[0], "two readings of the same bytes differ"
        assert topk.rows == len(ids) - 1 - start
        assert topk.actual_ids.tolist() == ids[start + 1 :].tolist()
        assert (topk.mass() <= 1 + MASS_TOLERANCE).all()
        assert not np.isnan(topk.actual_logp).any()
        assert ((topk.ids >= 0) & (topk.ids < VOCAB)).all()
        shown, known = topk.at(topk.actual_ids)
        listed = (topk.ids == topk.actual_ids[:, None]).any(axis=1)
        assert known.all()
        assert np.array_equal(shown, topk.actual_logp)
        row = topk.ids == topk.actual_ids[:, None]
        assert np.array_equal(topk.logp[row], topk.actual_logp[listed]), "the listed and the exact logprob are one"
    return "valid" if answers else type(outcomes["typed"]).__name__


def _with(read, body, ids, start, k):
    fast = read(body, ids, start, k)
    if fast is None:
        choice = decode.read_scored_choice(body)
        decode.check_prompt(choice.prompt_token_ids, ids)
        return decode.build_scores(decode.read_prompt_rows(choice, ids, start), ids, start, k, VOCAB)
    rows, envelope = fast
    decode.check_prompt(decode.read_scored_choice(envelope).prompt_token_ids, ids)
    return decode.build_ranked_scores(rows, ids, start, VOCAB)


def fuzz_scores(n: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    seen: dict[str, int] = {}
    for _ in range(n):
        body, ids, k = rng.choice(SEEDS)
        mutate = mutate_structure if rng.random() < 0.4 else mutate_text
        start = rng.choice((0, len(ids) // 2, len(ids) - 2))
        outcome = check_score(mutate(body, rng), ids, start, k)
        seen[outcome] = seen.get(outcome, 0) + 1
    return seen


def fuzz_samples(n: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    prompt = np.array([5, 6], dtype=np.int32)
    asked = SampleRequest(prompt, 2, SamplingParams(max_tokens=4), 2, VOCAB, exact=True)
    choices = [
        {
            "index": i,
            "token_ids": [11, 12],
            "finish_reason": "stop",
            "weight_versions": [{"version": "3"}],
            "logprobs": {
                "token_logprobs": [-0.5, -1.5],
                "tokens": ["token_id:11", "token_id:12"],
                "top_logprobs": [{"token_id:11": -0.5, "token_id:3": -1.5}, {"token_id:12": -1.5, "token_id:3": -0.9}],
            },
        }
        for i in range(2)
    ]
    body = json.dumps({"choices": choices}, separators=(",", ":")).encode()
    assert len(read_sampled_rollouts(body, asked=asked)) == 2
    seen: dict[str, int] = {}
    for _ in range(n):
        try:
            drawn = read_sampled_rollouts(mutate_text(body, rng), asked=asked)
        except (TopkdError, ServerBusyError) as error:
            outcome = type(error).__name__
        else:
            outcome = "valid"
            for rollout in drawn:
                assert np.isfinite(rollout.logp).all()
                assert rollout.logp.size == rollout.completion_ids.size == rollout.topk.rows
                assert rollout.topk.actual_ids.tolist() == rollout.completion_ids.tolist()
        seen[outcome] = seen.get(outcome, 0) + 1
    return seen


def fuzz_binary(n: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    matrix = -np.abs(np.random.default_rng(seed).normal(size=(4, 3))).astype("<f4")
    raw = _npy(matrix)
    ids = np.arange(12, dtype="<i4").tobytes()
    seen: dict[str, int] = {}
    for _ in range(n):
        try:
            if rng.random() < 0.7:
                out = read_npy_matrix(mutate_text(raw, rng), rows=4, k=3)
            else:
                _, out = read_flat_lists(mutate_text(matrix.tobytes(), rng), mutate_text(ids, rng), rows=4, k=3)
        except TopkdError as error:
            outcome = type(error).__name__
        else:
            outcome = "valid"
            assert out.shape == (4, 3)
            assert out.dtype == np.float32
            assert not np.isnan(out).any()
        seen[outcome] = seen.get(outcome, 0) + 1
    return seen


def fuzz_refusals(n: int, seed: int) -> None:
    rng = random.Random(seed)
    said = b'{"error":{"message":"Requested prompt logprobs of 64, which is greater than max allowed: 20","code":400}}'
    for _ in range(n):
        status = rng.choice((301, 400, 401, 404, 408, 409, 422, 429, 500, 503, 599))
        headers = {"retry-after": rng.choice(("1", "-1", "x", "9" * 30, "Wed, 21 Oct 2015 07:28:00 GMT", "\x00"))}
        error = error_from_reply(Reply(status, headers, mutate_text(said, rng)), where="http://h", k=64, model="m")
        assert isinstance(error, ServerError)
        assert "\n" not in str(error)
        assert len(str(error)) < 1500


def _npy(matrix: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, matrix)
    return out.getvalue()


def test_a_mutated_score_reply_is_a_valid_topk_or_a_typed_error():
    seen = fuzz_scores(4000, seed=1)
    assert seen["valid"] > 50, seen
    assert seen["AlignmentError"] > 50, seen
    assert seen["ResponseError"] > 500, seen


def test_a_mutated_sampling_reply_is_valid_rollouts_or_a_typed_error():
    seen = fuzz_samples(3000, seed=2)
    assert seen["valid"] > 20, seen
    assert sum(seen.values()) - seen["valid"] > 1000, seen


def test_a_mutated_binary_reply_is_a_valid_matrix_or_a_typed_error():
    seen = fuzz_binary(2000, seed=3)
    assert seen["valid"] > 20, seen
    assert seen["AlignmentError"] > 20, seen
    assert seen["ResponseError"] > 20, seen


def test_a_mutated_refusal_is_still_one_line_of_the_right_family():
    fuzz_refusals(1500, seed=4)


def test_a_binary_matrix_of_another_dtype_or_shape_is_refused():
    good = -np.ones((4, 3), dtype="<f4")
    assert np.array_equal(read_npy_matrix(_npy(good), rows=4, k=3), good)
    for bad in (
        good.astype("<f8"),
        good.astype(">f4"),
        good.astype("<i4"),
        good[:3],
        good[:, :2],
        good.T.copy().T,
        good[None],
    ):
        with pytest.raises(TopkdError):
            read_npy_matrix(_npy(bad), rows=4, k=3)
    holed = good.copy()
    holed[1, 1] = np.nan
    for bad in (_npy(holed), _npy(-holed), _npy(-good), _npy(good)[:-1], _npy(good) + b"x", b"", b"\x93NUMPY"):
        with pytest.raises(TopkdError):
            read_npy_matrix(bad, rows=4, k=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_thousand_mutated_replies():
    scores = fuzz_scores(140_000, seed=11)
    samples = fuzz_samples(30_000, seed=12)
    binary = fuzz_binary(20_000, seed=13)
    fuzz_refusals(10_000, seed=14)
    print("fuzz:", {"score": scores, "sample": samples, "binary": binary})
