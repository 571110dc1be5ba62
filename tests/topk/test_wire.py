"""JSON of samples, rollouts and top-K rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topkd.topk import (
    Rollout,
    SampleCore,
    SamplingParams,
    ScalarBehavior,
    ScalarPreparedSample,
    TopK,
    TopKBehavior,
    TopKPreparedSample,
)
from topkd.topk.errors import DataError
from topkd.topk.wire import (
    dumps,
    loads_behavior,
    loads_rollout,
    loads_sample,
    loads_topk,
    read_rollouts,
    read_samples,
    write_rollouts,
    write_samples,
)


def topk(start: int = 1, actual: tuple[int, ...] = (4, 9)) -> TopK:
    return TopK(
        start,
        np.array([[4, 7, -1], [5, 2, 1]], dtype=np.int32),
        np.array([[-0.1, -3.3333333, -np.inf], [-0.5, -1.5, -np.inf]], dtype=np.float32),
        np.array(actual, dtype=np.int32),
        np.array([-0.1, np.nan], dtype=np.float32),
        np.array([-2.9, np.nan], dtype=np.float32),
    )


def core() -> SampleCore:
    return SampleCore(
        full_ids=np.array([1, 2, 4, 9], dtype=np.int32),
        prompt_len=2,
        mask=np.array([True, False]),
        teacher_prompt_ids=np.array([8, 1, 2], dtype=np.int32),
        teacher_id="big",
        sample_id="row \u2028 7",
    )


def samples() -> list[ScalarPreparedSample | TopKPreparedSample]:
    logp = np.array([-0.125, -7.7], dtype=np.float32)
    return [
        ScalarPreparedSample(core(), ScalarBehavior(logp), np.array([-0.3, np.nan], dtype=np.float32)),
        TopKPreparedSample(core(), TopKBehavior(logp, topk()), topk(start=2)),
    ]


def rollout() -> Rollout:
    return Rollout(
        np.array([1, 2], dtype=np.int32),
        np.array([4, 9], dtype=np.int32),
        np.array([-0.1, -np.inf], dtype=np.float32),
        "length",
        SamplingParams(stop_token_ids=(2, 3), seed=7),
        topk(),
        "v3",
    )


def same(left: object, right: object) -> bool:
    """Equality by value of dataclasses that hold arrays; NaN equals NaN, and dtypes must agree."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
    if hasattr(left, "__dataclass_fields__"):
        return all(same(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__)
    return left == right


def test_a_sample_file_round_trips_exactly(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert write_samples(path, samples()) == 2
    back = list(read_samples(path))
    assert all(same(a, b) for a, b in zip(samples(), back, strict=True))
    assert len(path.read_bytes().split(b"\n")) == 3


def test_a_rollout_file_round_trips_exactly(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    bare = Rollout(np.array([1]), np.array([], dtype=np.int32), np.array([]), "abort", SamplingParams())
    assert write_rollouts(path, [rollout(), bare]) == 2
    assert all(same(a, b) for a, b in zip([rollout(), bare], read_rollouts(path), strict=True))


def test_the_file_is_strict_json_and_carries_its_tags() -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    plain = json.loads(dumps(samples()[1]), parse_constant=refuse)
    assert plain["kind"] == "topk"
    assert plain["behavior"]["kind"] == "topk"
    assert plain["teacher"]["logp"][0][2] == "-inf"
    assert plain["teacher"]["actual_logp"][1] is None
    assert json.loads(dumps(samples()[0]))["kind"] == "scalar"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.one_of(st.floats(-200, 0, width=32), st.just(-np.inf)),
            min_size=3,
            max_size=3,
        ),
        max_size=5,
    ),
    st.integers(0, 10**6),
)
def test_any_float32_survives_the_round_trip_bit_for_bit(rows: list[list[float]], start: int) -> None:
    logp = -np.sort(-np.array(rows, dtype=np.float32).reshape(-1, 3), axis=1) - np.float32(2)
    count = len(logp)
    value = TopK(
        start,
        np.tile(np.array([3, 1, 2], dtype=np.int32), (count, 1)),
        logp,
        np.full(count, -1, dtype=np.int32),
        logp[:, 0],
        np.full(count, np.nan, dtype=np.float32),
    )
    back = loads_topk(dumps(value))
    assert back == value
    assert back.logp.tobytes() == value.logp.tobytes()


@pytest.mark.parametrize("width", [0, 20])
def test_no_rows_keep_their_width(width: int) -> None:
    empty = TopK.from_lists([])
    value = TopK(3, empty.ids.reshape(0, width), empty.logp.reshape(0, width), *(np.array([]),) * 3)
    assert loads_topk(dumps(value)) == value


def test_a_behavior_is_read_by_its_kind() -> None:
    for behavior in (samples()[0].behavior, samples()[1].behavior):
        assert same(behavior, loads_behavior(dumps(behavior)))


def broken(change: object) -> str:
    plain = json.loads(dumps(samples()[1]))
    change(plain)
    return json.dumps(plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(extra=1), "extra"),
        (lambda s: s.pop("kind"), "kind"),
        (lambda s: s.update(kind="dense"), "kind"),
        (lambda s: s["core"].pop("mask"), "mask"),
        (lambda s: s["core"].update(mask=[1, 0]), "true and false"),
        (lambda s: s["core"].update(prompt_len=2.0), "prompt_len"),
        (lambda s: s["core"].update(full_ids=[1, 2, 4, 2**40]), "out of range"),
        (lambda s: s["core"].update(full_ids=[1, 2, 4, True]), "integers"),
        (lambda s: s["teacher"]["logp"][0].__setitem__(0, "-1"), "-inf"),
        (lambda s: s["teacher"]["logp"][0].__setitem__(0, -1e39), "float32"),
        (lambda s: s["teacher"]["logp"][0].__setitem__(0, None), "NaN"),
        (lambda s: s["teacher"]["ids"][0].pop(), "k entries"),
        (lambda s: s["teacher"].update(start=1), "start"),
        (lambda s: s["teacher"].update(actual_ids=[4, 8]), "another completion"),
        (lambda s: s["behavior"]["logp"].append(-1.0), "rows"),
    ],
)
def test_what_is_not_a_sample_is_refused_in_one_line_that_names_the_place(change: object, words: str) -> None:
    with pytest.raises(DataError) as caught:
        loads_sample(broken(change), where="samples.jsonl, line 3")
    message = str(caught.value)
    assert words in message
    assert "samples.jsonl, line 3" in message
    assert "\n" not in message


def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(dumps(samples()[0]) + "\n\n" + '{"kind": NaN}\n')
    reader = read_samples(path)
    assert same(next(reader), samples()[0])
    with pytest.raises(DataError, match=r"s\.jsonl, line 3"):
        next(reader)


def test_a_missing_file_and_an_unknown_sampling_key_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_samples(tmp_path / "none.jsonl"))
    plain = json.loads(dumps(rollout()))
    plain["sampling"]["typical_p"] = 0.5
    with pytest.raises(DataError, match="typical_p"):
        loads_rollout(json.dumps(plain))
    del plain["sampling"]["typical_p"], plain["sampling"]["top_p"]
    with pytest.raises(DataError, match="top_p"):
        loads_rollout(json.dumps(plain))
