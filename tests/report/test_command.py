"""``topkd report`` as it is typed."""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.fakes.interrupts import interruptible
from tests.report.made import write_comparison, write_run
from topkd.cli.app import app
from topkd.report.load.collection import gather
from topkd.report.page.content import build_content
from topkd.topk.errors import ConfigError, DataError

runner = CliRunner()


def test_a_run_gets_its_page_beside_it_and_the_verdict_on_the_terminal(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    result = runner.invoke(app, ["report", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    summary, headline = result.stdout.splitlines()[:2]
    assert summary == "Training worked: 60 steps of topk_pg, and the student came closer to the teacher."
    assert headline == "KL(student ‖ teacher) fell from 2 to 1.5 nats a token (−25 %)"
    assert (path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "report.html (" in result.stdout


def test_a_page_is_written_over_a_page_and_over_nothing_else(tmp_path: Path) -> None:
    path, run_log = write_run(tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    held = run_log.read_bytes()
    with pytest.raises(
        ConfigError, match=r"file exists and is not a topkd report .*metrics.jsonl\); choose another --out"
    ):
        runner.invoke(app, ["report", str(path), "--out", str(run_log)], catch_exceptions=False)
    assert run_log.read_bytes() == held
    (tmp_path / "empty.html").touch()
    for out in (tmp_path / "empty.html", tmp_path / "empty.html", tmp_path / "new.html"):
        assert runner.invoke(app, ["report", str(path), "--out", str(out)], catch_exceptions=False).exit_code == 0
        assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_json_holds_the_verdict_and_the_results(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    result = runner.invoke(app, ["report", str(folder), "--json", "--out", str(tmp_path / "p.html")])
    told = json.loads(result.stdout)
    assert told["out"] == str(tmp_path / "p.html")
    assert told["headline"].startswith("top-20 wins")
    assert [rank["label"] for rank in told["ranks"]] == ["top-20", "sampled token"]
    assert told["ranks"][1]["difference"]["n"] == 3
    assert told["results"][0]["setting"] == "top-20"


def test_figures_are_written_as_png_and_as_svg_with_text(tmp_path: Path) -> None:
    drop = tuple(
        key for key in ("ess", "clip_fraction", "ratio_max", "mismatch_kl", "entropy_lo", "entropy_hi", "topk_overlap",
                        "requests", "retries", "cache_hits", "teacher_bytes", "grad_noise", "effective_coefficient",
                        "grad_norm", "advantage_abs_mean", "staleness", "behavior_kl_k3", "missing_mass", "tail_mass",
                        "realised_in_topk", "eos_probability", "learn_s", "score_wait_s", "lr", "sync_kl",
                        "divergence_bucket", "publish_s")
    )  # fmt: skip
    paths = []
    for rate in ("$x$", "b"):
        path = write_run(tmp_path / rate, steps=20, drop=drop)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"objective": {"kind": rate}}))
        paths.append(str(path))
    figures = tmp_path / "figures"
    result = runner.invoke(app, ["report", *paths, "--out", str(tmp_path / "p.html"), "--figures", str(figures)])
    assert result.exit_code == 0
    names = {file.stem for file in figures.glob("*.svg")}
    assert {"reverse_kl", "reverse_kl-fresh", "agreement", "kl_k1", "ratio_hist", "scored", "seeds-last"} <= names
    assert {file.stem for file in figures.glob("*.png")} == names
    text = (figures / "reverse_kl.svg").read_text(encoding="utf-8")
    assert "KL(student ‖ teacher)" in text
    assert "$x$" in text  # a name, not a formula
    assert (figures / "reverse_kl.png").read_bytes()[:4] == b"\x89PNG"
    for drawn in figures.glob("*.svg"):
        assert "mathdefault" not in drawn.read_text(encoding="utf-8")  # a tick is a number, not its formula


def test_what_cannot_be_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no run in this folder"):
        runner.invoke(app, ["report", str(tmp_path / "none")], catch_exceptions=False)
    path = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the page"):
        runner.invoke(app, ["report", str(path), "--out", str(tmp_path / "file" / "p.html")], catch_exceptions=False)
    with pytest.raises(ConfigError, match="without --follow"):
        runner.invoke(app, ["report", str(path), "--follow", "--out", "p.html"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="no run to follow"):
        runner.invoke(app, ["report", str(tmp_path / "none"), "--follow"], catch_exceptions=False)


def test_follow_says_where_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "topkd", "report", "--follow", "--json", str(write_run(tmp_path / "run"))]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with interruptible(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as served:
        try:
            ready, _, _ = select.select([served.stdout], [], [], 60)
            assert ready, "no line within a minute"
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", json.loads(served.stdout.readline())["url"])
            served.send_signal(signal.SIGINT)
            assert served.wait(30) == 0
        finally:
            served.kill()


def test_labels_of_a_histograms_figure_do_not_run_into_each_other(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from topkd.report.page import figures

    path = write_run(tmp_path / "run", steps=5)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    edges = [2.0**power for power in range(-10, 11)]
    for record in lines:
        if record["kind"] == "step":
            record |= {"ratio_hist": [1] * 20, "ratio_hist_edges": edges}
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    page = build_content(gather([path]))
    panel = next(panel for section in page.data["sections"] for panel in section["panels"] if panel["kind"] == "hist")
    figure = Figure(figsize=(3.5, 2.5), layout="constrained")
    axes = figure.subplots()
    figures._draw_histogram(axes, page, panel)
    figure.canvas.draw()
    low, high = axes.get_xlim()
    boxes = [
        label.get_window_extent()
        for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if low <= tick <= high and label.get_text()
    ]
    assert len(boxes) > 2
    assert all(left.x1 + 2 < right.x0 for left, right in itertools.pairwise(boxes))
