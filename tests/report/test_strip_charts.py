"""Seed by seed: what is drawn are the seeds' own numbers, and no mean is taken with a run that never arrived."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.report.made import write_comparison, write_run
from topkd.report.load.collection import gather
from topkd.report.page.content import build_content


def strips_of(*paths: Path):
    return {one["key"]: one["strips"] for one in build_content(gather(paths)).data["seeds"]}


def test_the_paired_ratio_is_the_t_interval_of_the_log_ratio_to_the_best(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    rows = {row["arm"]: row["seeds"] for row in json.loads((folder / "compare.json").read_text())["live"]["arms"]}
    areas = {arm: np.array([seeds[str(seed)]["area"] for seed in range(3)]) for arm, seeds in rows.items()}
    values, ratios = strips_of(folder)["area"]
    assert [row["label"] for row in values["rows"]] == ["top-20", "sampled token"]
    assert values["rows"][0]["mean"] == pytest.approx(areas["topk_pg"].mean())
    (row,) = ratios["rows"]
    assert row["label"] == "against sampled token"  # the value is the best one's share of it
    expected = stats.ttest_rel(np.log(areas["topk_pg"]), np.log(areas["scalar_kl"])).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((math.exp(expected.low), math.exp(expected.high)), rel=1e-5)
    assert [dot["value"] for dot in row["dots"]] == pytest.approx(areas["topk_pg"] / areas["scalar_kl"])


def test_a_run_that_never_arrived_is_marked_where_it_ended_and_no_mean_is_taken(tmp_path: Path) -> None:
    values, ratios = strips_of(write_comparison(tmp_path / "cmp"))["tokens"]
    first, last = values["rows"]
    assert first["label"] == "top-20"
    assert first["mean"] is not None
    assert [(dot["value"], dot["late"]) for dot in last["dots"][:2]] == [(2000, True), (2000, True)]
    assert (last["mean"], last["low"], last["text"]) == (None, None, "2 of 3 never")
    (row,) = ratios["rows"]
    assert len(row["dots"]) == 1
    assert row["text"].endswith("(1 of 3 pairs)")
    assert row["low"] is None  # one pair shows no spread


def test_pairs_are_counted_of_all_seeds_also_where_the_best_arm_itself_was_late(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    summary = json.loads((folder / "compare.json").read_text())
    for row in summary["live"]["arms"]:
        for seed, fact in row["seeds"].items():
            fact["tokens_to_target"] = None if seed == "0" else {"topk_pg": 500.0, "scalar_kl": 1000.0}[row["arm"]]
    (folder / "compare.json").write_text(json.dumps(summary))
    _, ratios = strips_of(folder)["tokens"]
    assert ratios["rows"][0]["text"] == "0.500 (2 of 3 pairs)"


def test_runs_outside_a_comparison_have_their_last_values_alone(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"{kind}{seed}", kind, seed=seed) for kind in ("gjs", "topk_pg") for seed in (0, 1)]
    strips = strips_of(*paths)
    assert list(strips) == ["last"]
    assert [len(strip["rows"]) for strip in strips["last"]] == [2, 1]
    assert strips_of(paths[0]) == {}


def test_arms_without_seeds_draw_nothing_rather_than_fail(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    summary = json.loads((folder / "compare.json").read_text())
    for row in summary["live"]["arms"]:
        row["seeds"] = {}
    (folder / "compare.json").write_text(json.dumps(summary))
    assert list(strips_of(folder)) == ["last"]


def test_arms_that_never_arrive_stand_in_the_order_of_their_areas(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    summary = json.loads((folder / "compare.json").read_text())
    for row in summary["live"]["arms"]:
        for fact in row["seeds"].values():
            fact["tokens_to_target"] = None
    (folder / "compare.json").write_text(json.dumps(summary))
    strips = strips_of(folder)
    assert [row["text"] for row in strips["tokens"][0]["rows"]] == ["3 of 3 never"] * 2
    assert [row["label"] for row in strips["tokens"][0]["rows"]] == ["top-20", "sampled token"]
    assert [row["label"] for row in strips["area"][0]["rows"]] == ["top-20", "sampled token"]
