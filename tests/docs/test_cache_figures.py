"""The figures of docs/offline.md are those that the benchmark's last run left."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "benchmarks" / "results" / "bench_store.json").read_text())
TEXT = (ROOT / "docs" / "offline.md").read_text().partition("## 5 What it costs")[2]
PROSE = " ".join(TEXT.split())
ROWS = {cells[0]: [float(cell) for cell in cells[1:]] for line in TEXT.splitlines() if re.match(r"\| \S.*\d", line)
        for cells in [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")]]
        if not cells[1].startswith("K")}  # fmt: skip


def test_bytes_a_token_at_every_k_are_the_benchmarks():
    forms = {"packed": "packed (default)", "cold": "cold", "raw": "raw", "parquet": "Parquet fp16 zstd",
             "hf": "HF datasets nested lists"}  # fmt: skip
    for form, name in forms.items():
        assert ROWS[name] == [round(FOUND["bytes_per_token"][k][form], 1) for k in ("20", "64", "128")]


def test_opening_and_reading_at_every_size_are_the_benchmarks():
    assert ROWS["records"] == [row["records"] for row in FOUND["scaling"]] == [10.0**n for n in (3, 4, 5, 6)]
    assert ROWS["opening ms"] == [round(row["open_ms"], 1) for row in FOUND["scaling"]]
    assert ROWS["one read us"] == [round(row["get_us"]) for row in FOUND["scaling"]]


def test_the_shares_in_the_text_are_the_benchmarks():
    kl, scan = FOUND["kl_distortion"], FOUND["scan"]
    assert f"a KL by {100 * kl['fp16_tail_stored']:.2f} %" in PROSE
    assert f"by {100 * kl['fp16_tail_derived']:.2f} % if" in PROSE
    assert f"wrong by {kl['derived_tail_error_nats_p99']:.2f} nats" in PROSE
    assert f"runs at {scan['verify_bytes_per_s'] / scan['read_and_sum_bytes_per_s']:.2f} of" in PROSE
    assert f"NumPy alone reaches {FOUND['without_numba']['random_vs_hf']:.0f} times" in PROSE
