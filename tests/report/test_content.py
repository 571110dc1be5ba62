"""What the page draws: curves on the right axes, holes left open, and every absent field named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.made import write_comparison, write_run
from topkd.engine import EngineConfig, LearnerConfig
from topkd.report.load.collection import gather
from topkd.report.load.columns import read_column
from topkd.report.page.content import build_content
from topkd.report.page.panels import SECTIONS
from topkd.report.page.series import POINTS
from topkd.topk.errors import DataError

ALL = {panel.key for section in SECTIONS for panel in section.panels} | {"ratio_hist"}


def data_of(*paths: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(build_content(gather(paths)).data, allow_nan=False))
    return data


def panels(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {panel["key"]: panel for section in data["sections"] for panel in section["panels"]}


def append(path: Path, *records: dict[str, Any]) -> None:
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_a_full_run_log_fills_every_panel(tmp_path: Path) -> None:
    data = data_of(write_run(tmp_path / "run"))
    assert panels(data).keys() == ALL
    assert [section["absent"] for section in data["sections"]] == [[]] * len(SECTIONS)
    assert {axis["key"] for axis in data["axes"] if axis["ok"]} == {
        "tokens", "step", "seconds", "cost", "requests", "bytes",
    }  # fmt: skip


def test_a_field_that_is_absent_costs_its_panel_and_is_named(tmp_path: Path) -> None:
    data = data_of(write_run(tmp_path / "run", drop=("grad_noise", "ratio_hist", "elapsed_s", "scored_tokens")))
    assert panels(data).keys() == ALL - {"grad_noise", "ratio_hist"}
    absent = {section["key"]: section["absent"] for section in data["sections"]}
    assert absent["gradient"] == ["Gradient noise scale (grad_noise)"]
    assert absent["offpolicy"] == ["Importance ratios (ratio_hist)"]
    line = panels(data)["reverse_kl"]["lines"]["fixed"][0]
    assert line["x"]["seconds"] == pytest.approx([5.0 * i for i in range(7)])  # the stages' sum in place of elapsed_s
    assert line["x"]["cost"] == [1000 * i for i in range(7)]  # completion tokens in place of scored_tokens


def test_an_evaluation_stands_where_its_step_stands_on_every_axis(tmp_path: Path) -> None:
    line = panels(data_of(write_run(tmp_path / "run")))["reverse_kl"]["lines"]["fixed"][0]
    assert line["x"]["step"] == [0, 10, 20, 30, 40, 50, 60]
    assert line["x"]["tokens"] == [1000 * i for i in range(7)]
    assert line["x"]["requests"] == [40 * i for i in range(7)]
    assert line["y"] == pytest.approx([2.0 - 0.5 * i / 6 for i in range(7)], rel=1e-4)


def test_kinds_of_prefixes_are_kept_apart_whichever_way_they_are_written(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    append(path, {"kind": "eval", "step": 60, "prefixes": "teacher", "reverse_kl": 9.0})
    data = data_of(path)
    assert data["prefixes"] == ["fixed", "fresh", "teacher"]
    lines = panels(data)["reverse_kl"]["lines"]
    assert lines["fresh"][0]["y"][0] == pytest.approx(2.1)
    assert lines["teacher"][0]["y"] == [9]
    assert max(lines["fixed"][0]["y"]) == 2


def test_a_group_is_drawn_as_the_mean_of_its_seeds_where_all_of_them_have_a_value(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"s{seed}", seed=seed, done=60 if seed else 30) for seed in range(3)]
    data = data_of(*paths)
    assert [group["n"] for group in data["groups"]] == [3]
    lines = panels(data)["reverse_kl"]["lines"]["fixed"]
    (main,) = [line for line in lines if line["role"] == "main"]
    assert main["x"]["step"] == [0, 10, 20, 30]  # the shortest run ends the mean
    assert main["y"][-1] == pytest.approx(2.0 - (0.5 + 0.01) * 0.5, rel=1e-4)
    assert sum(line["role"] == "seed" for line in lines) == 3
    (span,) = panels(data)["kl_k1"]["lines"][""]
    assert all(low <= value <= high for low, value, high in zip(span["lo"], span["y"], span["hi"], strict=True))


def test_a_number_beyond_a_float_is_a_hole_too(tmp_path: Path) -> None:
    assert np.isnan(read_column([{"ess": 10**400}, {"ess": None}, {"ess": True}], "ess")).all()
    assert read_column([{"ess": 10**300}], "ess").tolist() == [1e300]


def test_null_in_a_run_log_is_a_hole_in_the_curve(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=20)
    append(path, {"kind": "step", "step": 21, "tokens": 100, "ess": None, "grad_norm": 1.0})
    line = panels(data_of(path))["ess"]["lines"][""][0]
    assert line["y"][-1] is None
    assert line["x"]["step"][-1] == 21
    # A step that does not say its requests leaves every later place on that axis unknown.
    assert line["x"]["requests"][-1] is None


def test_a_long_run_is_shortened_and_the_page_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=3000, every=1000)
    append(path, {"kind": "step", "step": 3001, "tokens": 100, "kl_k1": 77.0})
    page = build_content(gather([path]))
    raw, main = panels(page.data)["kl_k1"]["lines"][""]
    assert (raw["role"], main["role"]) == ("raw", "main")
    assert len(raw["y"]) <= POINTS
    assert max(raw["y"]) == 77
    assert any("Down-sampled" in note and "3,001" in note for note in page.notes)
    assert any("centred means over" in note for note in page.notes)
    assert not any("Down-sampled" in note for note in build_content(gather([write_run(tmp_path / "short")])).notes)


def test_the_ratio_histogram_adds_up_all_steps(tmp_path: Path) -> None:
    bins = panels(data_of(write_run(tmp_path / "run")))["ratio_hist"]
    assert bins["lines"][0]["y"] == pytest.approx(np.array([0, 0, 1, 9, 80, 8, 2, 0]) / 100)
    assert bins["lines"][0]["n"] == 6000


def test_gradient_noise_is_the_ratio_of_means_over_steps(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=40)
    (run,) = gather([path]).runs
    trace, signal = (np.array([record[key] for record in run.steps]) for key in ("grad_noise_trace", "grad_signal"))
    (line,) = panels(data_of(path))["grad_noise"]["lines"][""]
    assert line["role"] == "main"
    assert line["y"][20] == pytest.approx(trace[16:25].mean() / signal[16:25].mean(), rel=1e-4)
    assert line["y"][0] == pytest.approx(trace[:5].mean() / signal[:5].mean(), rel=1e-4)


def test_what_only_some_runs_have_is_not_missed(tmp_path: Path) -> None:
    special = ("sync_kl", "divergence_bucket", "publish_s", "sft_loss")
    data = data_of(write_run(tmp_path / "run", drop=special))
    assert panels(data).keys() == ALL - set(special)
    assert [section["absent"] for section in data["sections"]] == [[]] * len(SECTIONS)


def test_settings_that_differ_are_marked_and_seeds_are_not_a_setting(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"{kind}{seed}", kind, seed=seed) for kind in ("gjs", "topk_pg") for seed in (0, 1)]
    page = build_content(gather(paths))
    assert [(group.label, len(group.runs)) for group in page.groups] == [("gjs", 2), ("topk_pg", 2)]
    assert page.settings.rows[0] == ["objective.kind", "gjs", "topk_pg"]
    assert {row for row, _ in page.settings.marked} == {0}
    assert "seed" not in [row[0] for row in page.settings.rows]


def test_a_lone_run_is_held_against_the_defaults(tmp_path: Path) -> None:
    page = build_content(gather([write_run(tmp_path / "run")]), baseline={"k": 20, "learner": {"lr": 2e-6}})
    assert page.settings.columns == ["setting", "this run", "topkd's default"]
    assert page.settings.rows[0] == ["learner.lr", "0.001", "2e-06"]
    assert {row for row, _ in page.settings.marked} == {0}


def test_the_shortest_names_that_tell_settings_apart_are_used(tmp_path: Path) -> None:
    paths = []
    for rate in (1e-3, 3e-3):
        path = write_run(tmp_path / f"lr{rate}")
        config = json.loads((path / "config.json").read_text())
        config["learner"]["lr"] = rate
        (path / "config.json").write_text(json.dumps(config))
        paths.append(path)
    assert [group.label for group in gather(paths).groups()] == ["lr 0.001", "lr 0.003"]


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_a_folder_without_a_run_is_one_clear_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is no run in this folder .*: got (no such folder|an empty folder), expected"):
        gather([tmp_path / place])


def test_a_torn_last_line_waits_and_an_unreadable_one_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=20)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    assert len(gather([path]).runs[0].steps) == 20
    with (path / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(
        DataError, match=r"metrics\.jsonl:25\): got \{\"kind\": \"step\", \"st, expected one JSON object"
    ):
        gather([path])


def test_a_run_log_that_was_cut_back_is_read_anew(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=20)
    (run,) = gather([path]).runs
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:9]))
    assert run.refresh()
    assert len(run.steps) == 7
    assert not run.refresh()


def test_a_rate_that_is_left_to_the_kind_of_run_is_shown_with_its_values(tmp_path: Path) -> None:
    page = build_content(gather([write_run(tmp_path / "run")]), baseline=EngineConfig().model_dump(mode="json"))
    (row,) = (row for row in page.settings.rows if row[0] == "learner.lr")
    rates = [LearnerConfig().learning_rate(lora=lora) for lora in (False, True)]
    assert row[1:] == ["0.001", "2e-6; 1e-4 if only an adapter is trained"]
    assert [float(part.split()[0]) for part in row[2].split(";")] == rates


def test_an_unfinished_comparison_shows_its_cells_so_far(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp", seeds=1)
    (folder / "compare.json").unlink()
    page = build_content(gather([folder]))
    assert len(page.runs.rows) == 4
    assert any("not finished" in warning for warning in page.verdict.warnings)


@pytest.mark.parametrize(("low", "zero"), [(0.3, True), (1.2, False)])
def test_the_exact_divergences_begin_at_zero_all_of_them_or_none(tmp_path: Path, low: float, zero: bool) -> None:
    """Side by side, a line at the floor of one must not be a line at zero in the next."""
    path = write_run(tmp_path / "run")
    run_log = path / "metrics.jsonl"
    records = [json.loads(line) for line in run_log.read_text().splitlines()]
    evals = [record for record in records if record["kind"] == "eval"]
    for record in evals:
        record |= {"reverse_kl": 1.5, "forward_kl": 1.5, "jsd": 1.5}
    evals[-1]["reverse_kl"] = low
    run_log.write_text("".join(json.dumps(record) + "\n" for record in records))
    panels = {panel["key"]: panel for panel in build_content(gather([path])).data["sections"][0]["panels"]}
    assert [panels[key]["zero"] for key in ("reverse_kl", "forward_kl", "jsd")] == [zero] * 3
    assert panels["kl_k1"]["zero"] is None


def test_a_schedule_and_a_single_wait_are_drawn_as_they_were(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    run_log = path / "metrics.jsonl"
    records = [json.loads(line) for line in run_log.read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    for at, record in enumerate(steps):
        record |= {"lr": 1e-3 * min(1.0, (at + 1) / 5), "score_wait_s": 1.5 if at == 30 else 0.0}
    run_log.write_text("".join(json.dumps(record) + "\n" for record in records))
    panels = {one["key"]: one for section in data_of(path)["sections"] for one in section["panels"]}
    for key, drawn in (("lr", "lr"), ("wait_s", "score_wait_s")):
        (line,) = panels[key]["lines"][""]
        assert line["y"] == pytest.approx([record[drawn] for record in steps])
    assert len(panels["grad_norm"]["lines"][""]) == 2  # noisy: its values and their mean


def test_on_the_embedded_pair_accuracy_is_said_to_be_of_no_task(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    page = build_content(gather([folder]))
    assert "Next token of real text" in [label for label, *_ in page.verdict.facts]
    assert "Task accuracy" not in json.dumps(page.data["sections"])
    run = build_content(gather([write_run(tmp_path / "run")]))
    assert "Task accuracy" in [label for label, *_ in run.verdict.facts]
