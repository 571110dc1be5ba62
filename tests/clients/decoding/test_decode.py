"""Bytes of a scoring reply to arrays: three readings, one answer, and a typed error for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.clients.replies import score_body, score_reply, score_rows
from topkd.clients.decoding import vllm as decode
from topkd.clients.decoding import vllm_numba as decode_numba
from topkd.clients.decoding import vllm_numpy as decode_numpy
from topkd.clients.decoding.checks import build_ranked_scores, build_scores
from topkd.clients.decoding.vllm import read_prompt_rows, read_scored_choice
from topkd.topk.errors import AlignmentError, ResponseError
from topkd.topk.types import TopK

GOLDEN = Path(__file__).parents[2] / "golden"
CAPTURES = sorted((GOLDEN / "vllm-0.32.0").glob("a*.json"))
READERS = {"numpy": decode_numpy.read_rows}
if decode_numba.available():
    READERS["numba"] = decode_numba.read_rows_compiled


def typed(body: bytes, ids: np.ndarray, start: int, k: int, vocab: int | None = None) -> tuple[TopK, int]:
    return build_scores(read_prompt_rows(read_scored_choice(body), ids, start), ids, start, k, vocab)


def by_hand(rows: list, ids: np.ndarray, start: int, k: int) -> TopK:
    """The plainest reading: sort each row, take the realised token out when it is one too many."""
    lists, actual = [], []
    for position in range(start + 1, len(ids)):
        row = dict(rows[position])
        own = row[int(ids[position])]
        actual.append(own[0])
        if own[1] > k:
            del row[int(ids[position])]
        lists.append([(token, logp) for token, (logp, _) in row.items()])
    return TopK.from_lists(lists, start=start, actual_ids=ids[start + 1 :], actual_logp=np.float32(actual))


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest):
    return READERS[request.param]


@pytest.mark.parametrize(("length", "k", "start"), [(2, 1, 0), (40, 1, 3), (60, 20, 0), (60, 20, 41), (30, 128, 7)])
def test_every_reading_gives_what_a_plain_loop_gives(reader, length: int, k: int, start: int):
    ids, rows = score_rows(length, k, seed=length + k)
    body = score_body(ids, rows)
    fast = reader(body, ids, start, k)
    assert fast is not None, "vLLM's own form must take the fast path"
    expected = by_hand(rows, ids, start, k)
    assert build_ranked_scores(fast[0], ids, start)[0] == expected
    assert typed(body, ids, start, k)[0] == expected
    assert json.loads(fast[1])["choices"][0]["prompt_logprobs"] is None, "the envelope is the reply without its rows"


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(
        st.one_of(
            st.floats(-120, 0, width=32, allow_nan=False),
            st.floats(-(2.0**-10), 0, width=32),
            st.sampled_from(
                [0.0, -0.0, -9999.0, -1e-7, -1.1920928955078125e-07, -87.33654475, -99.99999237060547, -10.0]
            ),
        ),
        min_size=5,
        max_size=5,
    ),
    token=st.integers(0, 999_999),
)
@example(values=[-37.0, -37.0, -37.0, -1.401298464324817e-45, -9999.0], token=0)  # the smallest float32
def test_every_float32_that_a_server_writes_comes_back_bit_for_bit(values: list[float], token: int):
    logp = sorted((float(np.float32(v)) for v in values), reverse=True)
    probability = sum(np.exp(v) for v in logp[:4])
    if probability > 1:  # only distributions are served
        logp = [float(np.float32(v - np.log(probability) - 1e-6)) if v > -9000 else v for v in logp]
    row = {token: (logp[4], 5)} | {token + 1 + rank: (logp[rank - 1], rank) for rank in range(1, 5)}
    ids = np.full(8, token, dtype=np.int32)
    body = score_body(ids, [None] + [row] * 7)
    expected, zeros = typed(body, ids, 0, 4)
    for name, read in READERS.items():
        fast = read(body, ids, 0, 4)
        assert fast is not None, name
        assert build_ranked_scores(fast[0], ids, 0) == (expected, zeros), name
    want = np.float32([v if v > -9000 else -np.inf for v in logp])
    assert expected.actual_logp[0] == want[4]
    assert np.array_equal(np.sort(expected.logp[0]), np.sort(want[:4]))


@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.stem)
def test_a_real_servers_rows_are_read_alike_by_all(path: Path):
    capture = json.loads(path.read_text())
    request, response = capture["request"]["json"], capture["response"]
    if response["status"] != 200 or not isinstance(request["prompt"], list) or isinstance(request["prompt"][0], list):
        pytest.skip("a refusal, a batch, or a text prompt")
    k, ids = request["prompt_logprobs"], np.array(request["prompt"], dtype=np.int32)
    body = (response.get("raw_text") or json.dumps(response["body"], separators=(",", ":"))).encode()
    served = response["body"]["choices"][0]["prompt_logprobs"]
    if len(ids) < 2:
        assert served == [None]
        return
    rows = [row and {int(t): (e["logprob"], e["rank"]) for t, e in row.items()} for row in served]
    for start in (0, len(ids) // 2):
        expected = by_hand(rows, ids, start, k) if k else None
        answer = typed(body, ids, start, k, 2048)[0]
        assert np.array_equal(
            answer.actual_logp, np.float32([rows[i][int(ids[i])][0] for i in range(start + 1, len(ids))])
        )
        assert answer.k == k
        if expected is not None:
            assert answer == expected
            for name, read in READERS.items():
                fast = read(body, ids, start, k)
                assert fast is not None, name
                assert build_ranked_scores(fast[0], ids, start, 2048)[0] == expected, name


def test_the_peers_recorded_rows_are_read_by_id_not_by_order():
    """The goldens shuffle the entries of a row and put K or K + 1 into it; T08."""
    for case in json.loads((GOLDEN / "wire_vllm.json").read_text())["cases"]:
        served, k = case["prompt_logprobs"], case["top_k"]
        ids = np.array(case["sequence"], dtype=np.int32)
        if len(ids) < 2 or any(not row or any(e["logprob"] is None for e in row.values()) for row in served[1:]):
            continue
        if any(len({e["rank"] for e in row.values()} & set(range(1, k + 1))) != k for row in served[1:]):
            continue
        body = json.dumps({"choices": [{"index": 0, "prompt_logprobs": served}]}).encode()
        start = max(case["prompt_len"] - 1, 0)
        if start > len(ids) - 2:
            continue
        answer, _ = typed(body, ids, start, k)
        for row in range(answer.rows):
            truth = {int(t): e for t, e in served[start + 1 + row].items()}
            top = sorted((e["rank"], t) for t, e in truth.items() if e["rank"] <= k)
            assert answer.ids[row].tolist() == [t for _, t in top], case["name"]
            assert answer.actual_logp[row] == np.float32(truth[int(ids[start + 1 + row])]["logprob"]), case["name"]


def test_a_spelled_out_form_of_the_json_is_read_too():
    ids, rows = score_rows(12, 4)
    loose = json.dumps(json.loads(score_body(ids, rows)), indent=1).encode()
    assert all(read(loose, ids, 2, 4) is None for read in READERS.values())
    assert decode.read_vllm_scores(loose, ids=ids, start=2, k=4)[0] == by_hand(rows, ids, 2, 4)


def test_minus_9999_is_probability_zero_and_counted():
    ids, rows = score_rows(6, 3, extra=0.0)
    for row in rows[1:]:
        last = max(row, key=lambda t: row[t][1])
        row[last] = (-9999.0, 3)
    body = score_body(ids, rows)
    expected = typed(body, ids, 0, 3)
    assert expected[1] == 5
    assert np.isneginf(expected[0].logp[:, 2]).all()
    assert (expected[0].ids >= 0).all(), "the id stays: its probability is known to be zero"
    for name, read in READERS.items():
        assert build_ranked_scores(read(body, ids, 0, 3)[0], ids, 0) == expected, name


def test_equal_logprobs_are_ordered_by_id_whatever_the_server_does():
    ids = np.array([1, 9], dtype=np.int32)
    for order in ([9, 4, 2], [9, 2, 4]):
        row = {t: (-1.5, 1 + order.index(t)) for t in order}
        topk = decode.read_vllm_scores(score_body(ids, [None, row]), ids=ids, start=0, k=3)[0]
        assert topk.ids.tolist() == [[2, 4, 9]]


def _rows(change) -> tuple[bytes, np.ndarray]:
    ids, rows = score_rows(300, 4, seed=5, vocab=2048)
    change(ids, rows)
    return score_body(ids, rows), ids


def _shift(ids, rows):
    rows[1:-1] = rows[2:]


def _drop_last(ids, rows):
    rows.pop()


def _repeat_last(ids, rows):
    rows.append(rows[-1])


def _null_row(ids, rows):
    rows[250] = None


def _empty_row(ids, rows):
    rows[250] = {}


def _drop_entry(ids, rows):
    listed = [t for t in rows[250] if t != ids[250]]
    del rows[250][listed[0]]


def _other_actual(ids, rows):
    rows[250] = {(t + 1 if t == ids[250] else t): v for t, v in rows[250].items()}


def _heavy(ids, rows):
    rows[250] = {t: (-0.5, rank) for t, (_, rank) in rows[250].items()}


def _positive(ids, rows):
    token = next(t for t in rows[250] if rows[250][t][1] == 1)
    rows[250][token] = (0.7, 1)


def _past_vocab(ids, rows):
    token = next(t for t in rows[250] if t != ids[250])
    rows[250] = {(9_000 if t == token else t): v for t, v in rows[250].items()}


def _cut_to_k_with_actual(ids, rows):
    """What chat replies do: K entries, one of them the realised token of rank 700 in place of the K-th."""
    row = {t: v for t, v in rows[250].items() if t != ids[250]}
    kept = sorted(row.items(), key=lambda item: item[1][1])[:3]
    rows[250] = {int(ids[250]): (-19.0, 700), **dict(kept)}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (_shift, AlignmentError, "realised token"),
        (_drop_last, AlignmentError, "number of rows"),
        (_repeat_last, AlignmentError, "number of rows"),
        (_null_row, ResponseError, "null"),
        (_empty_row, ResponseError, "empty"),
        (_drop_entry, ResponseError, "entries|missing"),
        (_other_actual, AlignmentError, "realised token"),
        (_heavy, ResponseError, "mass above"),
        (_positive, ResponseError, "above 0"),
        (_past_vocab, ResponseError, "outside the vocabulary"),
        (_cut_to_k_with_actual, ResponseError, "missing"),
    ],
)
@pytest.mark.parametrize("reader_name", READERS)
def test_a_reply_that_lies_is_refused_with_its_place(change, kind, words, reader_name, monkeypatch: pytest.MonkeyPatch):
    body, ids = _rows(change)
    assert len(body) > decode._WORTH_IT, "large enough for the fast path to be tried"
    monkeypatch.setattr(decode_numpy, "read_rows", READERS[reader_name])
    with pytest.raises(kind, match=words) as caught:
        decode.read_vllm_scores(body, ids=ids, start=99, k=4, vocab_size=2048)
    place = {_shift: "row 0, predicting", _heavy: "source position 249", _drop_last: "rows", _repeat_last: "rows"}
    assert place.get(change, "row 150, predicting position 250") in str(caught.value)


@pytest.mark.parametrize("broken", [(b'"rank"', b"rank"), (b'"logprob":-', b'"logprob":NaN,"x":-'), (b"},{", b"},{{")])
def test_what_a_reader_skips_must_be_json_too(reader, broken: tuple[bytes, bytes]):
    body, ids = score_reply(300, 4)
    assert reader(body, ids, 200, 4) is not None
    assert reader(body.replace(*broken, 1), ids, 200, 4) is None


def test_rows_before_the_start_may_be_anything():
    ids, rows = score_rows(300, 4, seed=5)
    expected = by_hand(rows, ids, 200, 4)
    rows[100] = None
    assert decode.read_vllm_scores(score_body(ids, rows), ids=ids, start=200, k=4)[0] == expected


def test_another_prompt_in_the_reply_is_refused():
    ids, rows = score_rows(200, 4)
    other = ids.copy()
    other[3] += 1
    body = score_body(ids, rows, prompt_token_ids=other.tolist())
    with pytest.raises(AlignmentError, match="another prompt"):
        decode.read_vllm_scores(body, ids=ids, start=100, k=4)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"<html><title>502</title></html>", "HTML"),
        (b'{"choices":[{"index":0,"prompt_logprobs":[null,{"5":{"logprob":-1.0,"ra', "cut off"),
        (b'{"choices":[{"index":0,"prompt_logprobs":[null,{"5":{"logprob":NaN,"rank":1}}]}]}', "NaN"),
        (b'{"choices":[{"index":0,"prompt_logprobs":[null,{"5":{"logprob":-Infinity,"rank":1}}]}]}', "NaN or inf"),
        (b'{"choices":[{"index":0,"prompt_logprobs":[null,{"5":{"logprob":null,"rank":1}}]}]}', "null"),
        (b'{"choices":[{"index":0,"prompt_logprobs":[null,{"-5":{"logprob":-1,"rank":1}}]}]}', "token id"),
        (b'{"choices":[{"index":0,"prompt_logprobs":[null,{"99999999999999":{"logprob":-1,"rank":1}}]}]}', "token id"),
        (b'{"choices":[{"index":0,"prompt_logprobs":[null,{"9999999999999999999999":{"logprob":-1}}]}]}', "token id"),
        (b'{"choices":[{"index":0,"prompt_logprobs":null}]}', "no prompt_logprobs"),
        (b'{"choices":[{"index":0}]}', "no prompt_logprobs"),
        (b'{"choices":[]}', "number of choices"),
        (b'{"choices":[{"index":0},{"index":1}]}', "number of choices"),
        (b'{"object":"error"}', "shape"),
        (b"[1]", "shape"),
        (b'"x"', "shape"),
        (b'{"choices":[{"index":0,"prompt_logprobs":[null,{"5":{"logprob":1e999,"rank":1}}]}]}', "out of range"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON|shape"),
    ],
)
def test_an_unreadable_reply_is_one_clear_response_error(body: bytes, words: str):
    ids = np.array([3, 5], dtype=np.int32)
    with pytest.raises(ResponseError, match=words) as caught:
        decode.read_vllm_scores(body, ids=ids, start=0, k=1)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_listed_id_twice_is_refused():
    body = (
        b'{"choices":[{"index":0,"prompt_logprobs":[null,{"5":{"logprob":-1.0,"rank":1,"decoded_token":"a"},'
        b'"5":{"logprob":-1.5,"rank":2,"decoded_token":"a"}}]}],"pad":"' + b"x" * 20_000 + b'"}'
    )
    with pytest.raises(ResponseError):
        decode.read_vllm_scores(body, ids=np.array([3, 5], dtype=np.int32), start=0, k=2)


@pytest.mark.parametrize("installed", [True, False])
def test_numba_takes_over_where_it_is_installed_once_numpy_has_read_enough(installed, monkeypatch: pytest.MonkeyPatch):
    taken: list[str] = []
    monkeypatch.setattr(decode_numba, "available", lambda: installed)
    monkeypatch.setattr(decode_numpy, "read_rows", lambda *_: taken.append("numpy"))
    monkeypatch.setattr(decode_numba, "read_rows_compiled", lambda *_: taken.append("numba"))
    reader, ids = decode.FastReader(pays=250), np.arange(3, dtype=np.int32)
    for _ in range(5):
        reader.read(b"x" * 100, ids, 0, 1)
    assert taken == ["numpy"] * 3 + ["numba" if installed else "numpy"] * 2


@pytest.mark.skipif(not decode_numba.available(), reason="numba is not installed")
def test_numba_and_numpy_read_every_number_to_the_same_bits():
    """Which of them reads depends on how much a process has read: a resumed run may have come less far."""
    rng = np.random.default_rng(0)
    texts = [
        "-0.5",
        "-12.25",
        "-7",
        "0.0",
        "-0.0",
        "0",
        "-9999.0",
        "-1e-07",
        "-1.1920928955078125e-07",
        "-100.25",
        "-3.40282e-38",
    ]
    texts += ["-99.123456789012345678", "-1.12345678", "-1.123456789", "-1.1234567812345678", "-1.12345678123456789"]
    texts += [repr(float(np.float32(-v))) for v in rng.exponential(5.0, 3000)]
    texts += [repr(float(np.float32(-v))) for v in rng.exponential(1e-4, 500)]
    texts += [repr(-float(v)) for v in rng.exponential(5.0, 1500)]
    ids = np.full(len(texts) + 1, 7, dtype=np.int32)
    rows = ",".join(f'{{"7":{{"logprob":{text},"rank":1,"decoded_token":"a"}}}}' for text in texts)
    body = b'{"choices":[{"index":0,"prompt_logprobs":[null,' + rows.encode() + b']}],"pad":"' + b"x" * 100 + b'"}'
    ours, theirs = (READERS[name](body, ids, 0, 1) for name in ("numpy", "numba"))
    assert ours is not None
    assert theirs is not None
    for mine, other in ((ours[0].logp, theirs[0].logp), (ours[0].actual_logp, theirs[0].actual_logp)):
        assert mine.view(np.int64).tolist() == other.view(np.int64).tolist()
    assert np.allclose(ours[0].actual_logp, [float(text) for text in texts], rtol=0, atol=2e-15)


@pytest.mark.skipif(not decode_numba.available(), reason="numba is not installed")
def test_without_a_folder_to_cache_in_numba_still_compiles(monkeypatch: pytest.MonkeyPatch):
    import numba

    real, asked = numba.njit, []

    def njit(**options):
        asked.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", njit)
    assert callable(decode_numba.load_reader.__wrapped__())
    assert [bool(options.get("cache")) for options in asked] == [True, False]


def test_a_long_reply_takes_the_fast_path():
    body, ids = score_reply(200, 20)
    assert decode.read_vllm_scores(body, ids=ids, start=0, k=20)[2]
