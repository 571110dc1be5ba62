"""docs/benchmarks.md quotes ``benchmarks/results``: a rerun of a script changes both, or neither."""

from __future__ import annotations

import json

import pytest

from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").replace("\n", " ")


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def times(value):
    """A ratio as the table writes it: 4.4x, 44x."""
    return f"{value:.1f}x" if value < 9.95 else f"{value:.0f}x"


def share(value):
    return f"{value:.2f}".removeprefix("0")


def pairs():
    rows = result("pairs")["rows"]
    python = " / ".join(times(row["times_python"]) for row in rows)
    whole, blocked = (
        " / ".join(share(row[key]) for row in rows) for key in ("of_bound_whole", "of_bound_blocked")
    )  # fmt: skip
    yield f"{python}; {whole} of the exp/log bound on the whole batch, {blocked} in cache"


def decode():
    rows = result("bench_decode")["rows"]

    def of(reading):
        return [row["ratio"] for row in rows if row["reading"] == reading]

    for way, name in (("numpy", "core dependencies"), ("numba", "`[fast]`")):
        yield " / ".join(map(times, of(f"{way}, checked TopK"))) + f" with {name}"
        yield f"{' / '.join(map(times, of(f'{way}, arrays')))} to bare arrays"
    yield f"{min(of('npy') + of('flat base64')):.0f}x and more"


def scoring():
    rows = result("bench_scoring")["tokens"]["rows"]
    sides = {side: [row for row in rows if row["client"] == side] for side in ("topkd", "openai", "trl")}
    faster = {
        side: " / ".join(
            times(ours["tokens_per_s"] / row["tokens_per_s"])
            for ours, row in zip(sides["topkd"], sides[side], strict=True)
        )
        for side in ("openai", "trl")
    }
    yield f"tokens/s {faster['openai']}; {faster['trl']}"
    cpu = [
        row["cpu_s_per_mtok"] / ours["cpu_s_per_mtok"]
        for side in ("openai", "trl") for ours, row in zip(sides["topkd"], sides[side], strict=True)
    ]  # fmt: skip
    yield f"at 1/{min(cpu):.0f} to 1/{max(cpu):.0f} of the CPU"


def lengths():
    rows = result("bench_scoring")["lengths"]["rows"]
    for client, name in (("openai", "openai-python"), ("trl", "TRL")):
        warm, cold, process = (
            " / ".join(share(row[f"ratio_{what}"]) for row in rows if row["client"] == client)
            for what in ("warm_s", "cold_s", "process_s")
        )
        yield f"of {name}'s: warm {warm}, cold {cold}, as a whole process {process}"


def fused():
    rows = {(row["dtype"], row["side"]): row for row in result("fused")["results"]}

    def of(side, key):
        return [rows[dtype, "topkd fused"][key] / rows[dtype, side][key] for dtype in ("bfloat16", "float32")]

    bf16, f32 = of("naive dense", "scratch_mb")
    yield f"{100 * bf16:.1f} % of its scratch memory in bf16, {100 * f32:.1f} % in float32"
    bf16, f32 = of("naive dense", "cpu_seconds")
    yield f"{share(f32)} of its CPU time in float32 ({share(bf16)} in bf16)"
    for name, side in (("Liger's form at 256 rows", "liger form 256"), ("liger-kernel's own JSD", "liger package")):
        scratch = " and ".join(f"{100 * ratio:.0f} %" for ratio in of(side, "scratch_mb"))
        yield f"of {name} {scratch}, {' and '.join(share(ratio) for ratio in of(side, 'cpu_seconds'))} of the time"


def store():
    found = result("bench_store")
    size, ratio, plain = found["bytes_per_token"]["64"], found["ratios"], found["without_numba"]
    measured = {name: entry["measured"] for name, entry in ratio.items()}
    yield f"K = 64, {size['packed']:.0f} B/token ({size['cold']:.0f} cold)"
    fast = f"sequential {times(measured['sequential_vs_hf'])}, random {times(measured['random_vs_hf'])}"
    slow = f"({times(plain['sequential_vs_hf'])} and {times(plain['random_vs_hf'])} without `[fast]`)"
    yield f"{share(measured['bytes_vs_hf'])}x the bytes, {fast} {slow}"
    fast = f"random {times(measured['random_vs_parquet'])}, sequential {times(measured['sequential_vs_parquet'])}"
    yield f"{fast}, cold codec {share(measured['cold_bytes_vs_parquet'])}x the bytes"


def estimators():
    ratios = {arm["arm"]: arm["tokens_ratio"] for arm in result("estimators")["live"]["arms"]}
    best, gjs = ratios["topk_pg"], ratios["gjs"]
    yield f"{share(best['ratio'])}x ({share(best['low'])} to {share(best['high'])}, paired)"
    yield f"`gjs` {share(gjs['ratio'])}x ({share(gjs['low'])} to {gjs['high']:.2f})"


def overlap():
    rows = result("overlap")["rows"]
    ours, theirs = ([row[key] for row in rows] for key in ("busy", "busy_sequential"))
    sequential = f"(sequential {share(min(theirs))}-{share(max(theirs))})"
    yield f"slowest stage busy {share(min(ours))}-{share(max(ours))} of the time {sequential}"


def report():
    against = [row["against_empty"] for row in result("report")["results"] if row["against_empty"] != 1]
    yield f"opens in {min(against):.1f}-{max(against):.1f}x its time"


@pytest.mark.parametrize("figures", [pairs, decode, scoring, lengths, fused, store, estimators, overlap, report])
def test_the_readme_quotes_what_its_script_measured_last(figures):
    missing = [words for words in figures() if words not in PAGE]
    assert missing == [], f"docs/benchmarks.md: {figures.__name__} is now {'; '.join(missing)}"


def test_every_result_that_is_kept_names_its_machine():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        assert json.loads(path.read_text(encoding="utf-8"))["machine"], path.name
