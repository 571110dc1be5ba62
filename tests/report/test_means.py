"""What several runs of a setting come to: no mean holds a run that failed, and what seeds cannot tell is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.report.made import write_comparison, write_run
from topkd.report.load.collection import gather
from topkd.report.page.content import build_content


def page_of(*paths: Path):
    return build_content(gather(paths))


def failed(folder: Path, arm: str, seed: int, **last) -> None:
    """The live cell of an arm and seed is said to have failed, after the records in ``last``."""
    summary = json.loads((folder / "compare.json").read_text())
    (cell,) = (one for one in summary["cells"] if one["id"] == f"live-{arm}-seed{seed}")
    cell["status"] = "failed"
    (folder / "compare.json").write_text(json.dumps(summary))
    with (folder / cell["run"] / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"kind": kind, "step": 21, **record}) + "\n" for kind, record in last.items())


def test_no_mean_of_a_table_or_fact_holds_a_run_that_failed(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    before = page_of(folder)
    rows = {row[0]: dict(zip(before.summary.columns, row, strict=True)) for row in before.summary.rows}
    assert rows["top-20"]["runs"] == "3"
    wild = {"tokens": 9_000_000, "completion_tokens": 9_000_000, "elapsed_s": 1e6, "clip_fraction": 1.0}
    failed(folder, "topk_pg", 1, step=wild, eval={"reverse_kl": 1e6})
    page = page_of(folder)
    row = {row[0]: dict(zip(page.summary.columns, row, strict=True)) for row in page.summary.rows}["top-20"]
    assert row["runs"] == "2 of 3"
    assert row["mean KL(student ‖ teacher)"] == rows["top-20"]["mean KL(student ‖ teacher)"]  # seeds 0, 2: as of all
    assert row["tokens"] == rows["top-20"]["tokens"]
    assert dict(fact[:2] for fact in page.verdict.facts)["Tokens trained on"] == "2,000"
    (training,) = (table for table in page.more if table.title == "How training went")
    clipped = training.columns.index("ratios clipped")
    assert [row[clipped] for row in training.rows if row[0] == "top-20"] == ["1 %"]


def test_a_warning_about_one_of_several_runs_names_it(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"run{seed}", seed=seed) for seed in range(3)]
    with (paths[1] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "step", "step": 61, "tokens": 0, "skipped": "non-finite gradient"}) + "\n")
    assert (
        "run1: 1 of 61 steps changed no weight (`skipped` in the run log has the reason)"
        in page_of(*paths).verdict.warnings
    )


def test_settings_whose_runs_share_a_seed_and_pairs_that_contradict_the_means_are_told(tmp_path: Path) -> None:
    paths = []
    for kind, ends in (("topk_pg", {0: 1.0, 1: 1.01, 2: 0.1}), ("gjs", {0: 0.9, 1: 0.91})):
        for seed, end in ends.items():
            paths.append(write_run(tmp_path / f"{kind}{seed}", kind, seed=seed))
            with (paths[-1] / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "eval", "step": 60, "reverse_kl": end}) + "\n")
    said = page_of(*paths).verdict
    assert said.headline == "No clear winner between topk_pg and gjs"
    assert "is below zero: on the seeds that both have, gjs is better" in said.detail
    assert not any("share a seed" in warning for warning in said.warnings)
    again = shutil.copytree(paths[0], tmp_path / "again")
    assert any("share a seed" in warning for warning in page_of(*paths, again).verdict.warnings)
