"""Other tools' captures arrive aligned, or are refused: Axolotl's columns, DistillKit's packed ones."""

from __future__ import annotations

import numpy as np
import pytest

from tests.offline.samples import scored
from topkd.offline import ScoreStore, TeacherIdentity, import_axolotl, import_distillkit
from topkd.offline.exchange.imports import DistillKitLayout
from topkd.topk.errors import AlignmentError, ConfigError, DataError

pq = pytest.importorskip("pyarrow.parquet")

TEACHER = TeacherIdentity("teacher", revision="r")


def captured(seed: int, tokens: int = 60, k: int = 8):
    """A sequence whose next tokens mostly are in the lists that predict them, as real ones are."""
    rng = np.random.default_rng(seed)
    ids, scores = scored(seed, tokens=tokens, k=k, start=0)
    top = scores.ids.copy()
    for row in range(tokens - 1):
        if rng.random() < 0.9 and ids[row + 1] not in top[row]:
            top[row, rng.integers(k)] = ids[row + 1]
    return ids, top, scores.logp


def raw_entries(top, logp, at):
    return [{"token": f"token_id:{t}", "logprob": float(v)} for t, v in zip(top[at], logp[at], strict=True)]


@pytest.mark.parametrize("token", [2**32 + 5, 1.5])
def test_a_captured_id_that_is_none_is_refused_and_not_wrapped_or_rounded(tmp_path, token):
    ids, top, logp = captured(2)
    lists = top.tolist()
    lists[10][0] = token
    row = {"input_ids": ids.tolist(), "vllm": logp.tolist(), "target_token_ids": lists}
    good = {**row, "target_token_ids": top.tolist()}
    with ScoreStore(tmp_path, mode="a") as store:
        done = import_axolotl([good, row], store, TEACHER, logprobs_field="vllm")
    assert done.records == 1
    assert [text.split(":")[0] for text in done.refused] == ["row 1"]


def test_axolotl_raw_logprobs_are_about_the_last_tokens(tmp_path):
    ids, top, logp = captured(1)
    entries = [raw_entries(top, logp, at) for at in range(19, 59)]
    entries[3] = None
    entries[4] = list(reversed(entries[4]))  # order is not relied on
    row = {"input_ids": ids.tolist(), "logprobs": entries}
    with ScoreStore(tmp_path, mode="a", codec="raw") as store:
        assert import_axolotl([row], store, TEACHER).refused == []
        found = store.get(TEACHER, ids, 19, 8)
    assert found.rows == 40
    assert (found.ids[3] == -1).all()
    keep = [n for n in range(40) if n != 3]
    assert found.ids[keep].tolist() == top[19:][keep].tolist()
    assert found.logp[keep].tolist() == logp[19:][keep].tolist()
    expected = np.log1p(-np.exp(logp[19:].astype(np.float64)).sum(1))
    assert np.allclose(found.tail_logp[keep], expected[keep], atol=1e-6)
    assert np.isnan(found.actual_logp).all()  # never looked up in the list


def test_axolotl_rows_may_bring_a_tokeniser_and_floats_beside_ids(tmp_path):
    ids, top, logp = captured(2)
    row = {"messages": "x", "vllm": logp.tolist(), "target_token_ids": top.tolist()}
    with ScoreStore(tmp_path, mode="a", codec="raw") as store:
        assert "pass tokenise=" in import_axolotl([row], store, TEACHER, logprobs_field="vllm").refused[0]
        done = import_axolotl([row], store, TEACHER, logprobs_field="vllm", tokenise=lambda _: ids)
        assert done.tokens == 59
        assert store.get(TEACHER, ids, 0, 8).ids.tolist() == top.tolist()


def test_axolotl_prepared_columns_are_kept_apart_and_without_a_tail(tmp_path):
    ids, top, logp = captured(3)
    normal = logp - np.log(np.exp(logp.astype(np.float64)).sum(1, keepdims=True))
    pad = [[0] * 8]
    row = {
        "input_ids": ids.tolist(),
        "target_token_ids": top.tolist() + pad,
        "target_logprobs": [*normal.tolist(), [-1000000000.0] * 8],
        "target_mask": [[0] * 8] * 10 + [[1] * 8] * 49 + pad,
    }
    with ScoreStore(tmp_path, mode="a", codec="raw") as store:
        import_axolotl([row], store, TEACHER)
        assert store.get(TEACHER, ids, 0, 8) is None
        kept = store.get(TeacherIdentity("teacher", revision="r", semantics="renormalised_topk"), ids, 0, 8)
    assert not kept.signal[:10].any()
    assert kept.ids[10:].tolist() == top[10:].tolist()
    assert np.allclose(kept.logp[10:], normal[10:], atol=1e-6)
    assert np.isnan(kept.tail_logp).all()


def test_a_shifted_capture_is_refused_before_anything_is_written(tmp_path):
    rows = []
    for seed in range(3):
        ids, top, logp = captured(seed)
        columns = {"target_token_ids": [*top.tolist(), [0] * 8], "target_logprobs": [*logp.tolist(), [-1.0] * 8]}
        rows.append({"input_ids": ids.tolist(), **columns})
    with ScoreStore(tmp_path, mode="a") as store:
        with pytest.raises(AlignmentError, match="shifted"):
            import_axolotl(rows, store, TEACHER, shifted=False)
        assert len(store) == 0
        assert import_axolotl(rows, store, TEACHER, shifted=True).records == 3


def test_lists_that_are_no_distribution_become_holes_and_rounded_ones_are_scaled(tmp_path):
    ids = np.arange(4, dtype=np.int32)
    rows = [[(1, -0.1), (2, -0.1)], [(7, np.log(0.6)), (8, np.log(0.405))], [(5, -0.5), (5, -0.2), (6, -3.0)]]
    entries = [[{"token": f"token_id:{t}", "logprob": v} for t, v in row] for row in rows]
    with ScoreStore(tmp_path, mode="a", codec="raw") as store:
        import_axolotl([{"input_ids": ids, "logprobs": entries}], store, TEACHER)
        found = store.get(TEACHER, ids, 0, 3)
    assert not found.signal[0]
    assert np.isclose(found.mass()[1], 1.0)
    assert found.ids[2].tolist() == [5, 6, -1]
    assert np.isclose(found.logp[2, 0], -0.2)


SETTINGS = {
    "d": 151_936,
    "k": 8,
    "exact_k": 3,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 5, "num_elements": 4}],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": False,
}


def bits(values, width):
    """Most significant bit first, through text: slow and obvious."""
    text = "".join(format(int(value), f"0{width}b") for value in values)
    text += "0" * (-len(text) % 8)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


def squeezed(logp_row, settings=SETTINGS):
    """One position in DistillKit's layout, and the values that a reader should get."""
    head = np.float32(logp_row[:3]).view(np.uint32) >> 16
    points = np.arange(5.0)
    basis = np.stack([points**0, points, np.sqrt(points)], 1)
    coefficients = np.linalg.lstsq(basis, logp_row[3:].astype(float), rcond=None)[0].astype(np.float32)
    residual = logp_row[3:7] - (basis @ coefficients)[:4]
    scale = np.float16(max(np.abs(residual).max() / 16, 1e-4))
    steps = np.clip(np.round(residual / np.float64(scale)), -16, 15)
    data = [*head.astype("<u2").tobytes(), *coefficients.tobytes(), *scale.tobytes(), *bits(steps + 16, 5)]
    rest = basis @ coefficients.astype(float)
    rest[:4] += steps * np.float64(scale)
    return data, np.concatenate([(head << 16).view(np.float32), rest])


def write_capture(folder, rows, settings=SETTINGS):
    import pyarrow as pa
    import yaml

    folder.mkdir()
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    pq.write_table(pa.Table.from_pylist(rows), folder / "data_0.parquet")


def test_distillkit_captures_are_unpacked_row_for_row(tmp_path):
    rows, expected = [], {}
    for seed in range(3):
        ids, top, logp = captured(seed)
        both = [squeezed(row) for row in logp]
        indices = [bits(row, 18) for row in top]
        rows.append(
            {"input_ids": ids.tolist(), "compressed_logprobs": [b[0] for b in both], "bytepacked_indices": indices}
        )
        expected[seed] = (ids, top, np.stack([b[1] for b in both]))
    write_capture(tmp_path / "capture", rows)
    semantics = DistillKitLayout.load(SETTINGS, tmp_path).semantics
    assert semantics == "distillkit_lossy;exact=3/8 bfloat16;terms=3;residual=4"
    with ScoreStore(tmp_path / "cache", mode="a", codec="raw") as store:
        done = import_distillkit(tmp_path / "capture", store, TEACHER)
        assert (done.records, done.refused) == (3, [])
        teacher = TeacherIdentity("teacher", revision="r", semantics=semantics)
        for ids, top, values in expected.values():
            found = store.get(teacher, ids, 0, 8)
            assert store.get(TEACHER, ids, 0, 8) is None
            order = np.argsort(-values, axis=1, kind="stable")
            light = np.exp(values).sum(1) < 1  # others are scaled, see above
            assert light.sum() > 30
            assert found.ids[light].tolist() == np.take_along_axis(top, order, 1)[light].tolist()
            assert np.allclose(found.logp[light], np.take_along_axis(values, order, 1)[light], atol=1e-5)
            assert np.isnan(found.tail_logp).all()


def test_an_exact_distillkit_capture_keeps_raw_semantics_and_its_tail(tmp_path):
    ids, top, logp = captured(4)
    settings = {**SETTINGS, "exact_k": 8, "exact_dtype": "float32", "polynomial_terms": None, "residual_bins": []}
    data = [list(row.astype("<f4").tobytes()) for row in logp]
    packed = [bits(row, 18) for row in top]
    write_capture(
        tmp_path / "capture",
        [{"input_ids": ids.tolist(), "compressed_logprobs": data, "bytepacked_indices": packed}],
        settings,
    )
    with ScoreStore(tmp_path / "cache", mode="a", codec="raw") as store:
        import_distillkit(tmp_path / "capture", store, TEACHER)
        found = store.get(TEACHER, ids, 0, 8)
    assert found.logp.tobytes() == logp.tobytes()
    assert np.allclose(found.tail_logp, np.log1p(-np.exp(logp.astype(np.float64)).sum(1)), atol=1e-6)


def test_delta_encoding_is_undone(tmp_path):
    settings = {**SETTINGS, "exact_k": 8, "exact_dtype": "float32", "polynomial_terms": [], "residual_bins": [],
                "delta_encoding": True}  # fmt: skip
    _, _, logp = captured(5)
    steps = np.diff(logp.astype(np.float64), axis=1, prepend=0).astype("<f4")
    layout = DistillKitLayout.load(settings, tmp_path)
    _, values = layout.decode([bits(range(8), 18)] * len(logp), [list(row.tobytes()) for row in steps])
    assert np.allclose(values, logp, atol=1e-5)
    assert not layout.exact


def test_captures_that_cannot_be_read_say_why(tmp_path):
    ids, _top, _logp = captured(6)
    write_capture(tmp_path / "old", [{"input_ids": ids.tolist(), "packed_indices": [[1]]}])
    with ScoreStore(tmp_path / "cache", mode="a") as store:
        assert "legacy layout" in import_distillkit(tmp_path / "old", store, TEACHER).refused[0]
        (tmp_path / "old" / "compression_config.yaml").unlink()
        with pytest.raises(DataError, match="the DistillKit settings cannot be read"):
            import_distillkit(tmp_path / "old", store, TEACHER)
        with pytest.raises(ConfigError, match="not DistillKit compression settings"):
            import_distillkit(tmp_path / "old", store, TEACHER, config={"k": 3})
        with pytest.raises(DataError, match="no Parquet capture"):
            import_distillkit(tmp_path / "nowhere", store, TEACHER)
