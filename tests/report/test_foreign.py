"""Completions that the student did not draw: log s - log t on them is no estimate of KL, and wins nothing."""

from __future__ import annotations

import json
from pathlib import Path

from tests.report.made import write_run
from topkd.report.analysis.formatting import format_number
from topkd.report.analysis.outcome import SAMPLED
from topkd.report.load.collection import gather
from topkd.report.page.content import Page, build_content


def written(folder: Path, kind: str = "gjs", *, foreign: bool, shift: float = 0.0, seed: int = 0) -> Path:
    """A run without evaluations; a foreign one's steps know no staleness, as of a replay of another's completions."""
    path = write_run(folder, kind, seed=seed, drop=("sft_loss",))
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "step":
            record["kl_k1"] += shift
            record["staleness"] = None if foreign else record["staleness"]
    kept = [record for record in records if record["kind"] != "eval"]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return path


def page_of(*paths: Path) -> Page:
    return build_content(gather(paths))


def chart(page: Page) -> dict[str, str]:
    (found,) = (
        panel for section in page.data["sections"] for panel in section["panels"] if panel["key"] == SAMPLED.key
    )
    return {"title": found["title"], "note": found["note"]}


def test_a_replay_of_anothers_completions_is_no_estimate_of_kl(tmp_path: Path) -> None:
    page = page_of(written(tmp_path / "written", foreign=True, shift=-4.0))
    said = page.verdict
    assert said.headline.startswith("log student/teacher ratio on replayed completions fell from −2.")
    assert said.headline.endswith("nats a token")
    assert said.detail.startswith("On completions that the trained student did not sample")
    assert "does not estimate KL" in said.detail
    assert "and no estimate of it: [eval] in the run file" in said.warnings[0]
    assert chart(page) == {
        "title": "Mean log S/T on the completions of a step",
        "note": "No estimate of KL(S ‖ T): the trained student did not sample these completions.",
    }
    assert "log(S/T), replayed" in page.runs.columns
    assert not any("estimate" in column for column in [*page.runs.columns, *page.summary.columns])


def test_a_ratio_above_zero_has_no_percentage_either(tmp_path: Path) -> None:
    assert "%" not in page_of(written(tmp_path / "given", foreign=True)).verdict.headline
    seeds = [written(tmp_path / f"given{seed}", foreign=True, seed=seed) for seed in range(2)]
    said = page_of(*seeds).verdict
    assert said.headline.startswith("log student/teacher ratio on replayed completions went from ")
    assert "%)" not in said.headline
    assert "does not estimate KL" in said.detail


def test_against_a_run_on_its_own_rollouts_it_neither_wins_nor_loses(tmp_path: Path) -> None:
    paths = []
    for seed in range(4):
        paths.append(written(tmp_path / f"own{seed}", "topk_pg", foreign=False, seed=seed))
        paths.append(written(tmp_path / f"given{seed}", "gjs", foreign=True, shift=-4.0, seed=seed))
    page = page_of(*paths)
    said = page.verdict
    assert said.headline == "No winner: these run logs have no KL with which the settings could be compared"
    assert said.tone == "open"
    assert said.detail.startswith("gjs: trained on completions that the trained student did not sample")
    assert said.ranks == []
    assert "is based on" not in said.warnings[0]
    assert chart(page)["title"] == "Mean log S/T on the completions of a step"
    assert chart(page)["note"].startswith("An estimate of KL(S ‖ T), but not for gjs: ")
    assert chart(page)["note"].endswith(" did not sample these completions.")
    at = {name: place for place, name in enumerate(page.summary.columns)}
    cells = {row[0]: row for row in page.summary.rows}
    assert cells["gjs"][at["KL(S‖T), estimate"]] == format_number(None)
    assert cells["gjs"][at["log(S/T), replayed"]].startswith("−")
    assert cells["topk_pg"][at["log(S/T), replayed"]] == format_number(None)


def test_two_replays_are_not_ranked_by_it(tmp_path: Path) -> None:
    paths = [
        written(tmp_path / f"{kind}{seed}", kind, foreign=True, shift=shift, seed=seed)
        for kind, shift in (("gjs", 0.0), ("topk_pg", -4.0))
        for seed in range(3)
    ]
    said = page_of(*paths).verdict
    assert said.headline.startswith("No winner: ")
    assert said.detail.startswith("gjs, topk_pg: trained on")
    assert said.ranks == []


def test_settings_on_their_own_rollouts_are_still_ranked_beside_it(tmp_path: Path) -> None:
    paths = [
        written(tmp_path / f"{kind}{seed}", kind, foreign=kind == "gjs", shift=shift, seed=seed)
        for kind, shift in (("gjs", -9.0), ("topk_pg", 0.0), ("scalar_kl", 1.0))
        for seed in range(3)
    ]
    said = page_of(*paths).verdict
    assert said.headline.startswith("topk_pg wins: estimated KL(student ‖ teacher) lower by ")
    assert [rank.label for rank in said.ranks] == ["topk_pg", "scalar_kl"]
    assert any(warning.startswith("gjs: trained on completions") for warning in said.warnings)


def test_runs_that_differ_only_in_who_drew_are_two_settings(tmp_path: Path) -> None:
    own, given = written(tmp_path / "own", foreign=False), written(tmp_path / "given", foreign=True, seed=1)
    assert [group.label for group in page_of(own, given).groups] == ["default", "replayed"]
    assert page_of(own, given).verdict.headline.startswith("No winner: ")


def test_an_exact_kl_ranks_a_replay_like_any_other(tmp_path: Path) -> None:
    paths = []
    for seed in range(3):
        paths.append(written(tmp_path / f"own{seed}", "topk_pg", foreign=False, seed=seed))
        paths.append(written(tmp_path / f"given{seed}", "gjs", foreign=True, seed=seed))
    for path in paths:
        kl = 1.0 if path.name.startswith("given") else 1.5
        with (path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "eval", "step": 60, "reverse_kl": kl}) + "\n")
    said = page_of(*paths).verdict
    assert said.headline == "gjs wins: KL(student ‖ teacher) lower by 0.5 nats a token"
