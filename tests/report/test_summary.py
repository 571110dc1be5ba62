"""The first sentence of a page, the size of small changes, and what the student wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.made import write_comparison, write_run
from topkd.report.analysis.formatting import format_change
from topkd.report.analysis.intervals import compute_interval
from topkd.report.load.collection import gather
from topkd.report.page.content import build_content
from topkd.report.page.html import render_page


def verdict_of(*paths: Path) -> Any:
    return build_content(gather(paths)).verdict


def facts_of(path: Path) -> dict[str, tuple[str, str]]:
    return {label: (value, remark) for label, value, remark in verdict_of(path).facts}


def write_evals(folder: Path, *values: dict[str, Any], steps: int = 10) -> Path:
    """A run whose log holds these evaluations alone, the last at its last step."""
    path = write_run(folder, steps=steps, every=steps + 1, drop=("kl_k1", "sft_loss"))
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in records if record["kind"] != "eval"]
    kept += [{"kind": "eval", "step": steps * n // max(1, len(values) - 1), **value} for n, value in enumerate(values)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return path


def write_estimates(folder: Path, values: list[float], **fields: Any) -> Path:
    """A run whose steps estimate these KLs, and that has no evaluation."""
    path = write_run(folder, steps=len(values), every=len(values) + 1, drop=("sft_loss",))
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    records = [step | {"kl_k1": value, **fields} for step, value in zip(steps, values, strict=True)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("last", "text"),
    [
        (0.5, " (−50 %)"),
        (0.896, " (−10 %)"),
        (0.968, " (−3.2 %)"),
        (1.004, " (+0.4 %)"),
        (1.0001, " (less than 0.1 %)"),
        (1.0, ""),
        (-0.5, ""),
    ],
)
def test_a_change_below_ten_per_cent_has_a_decimal(last: float, text: str) -> None:
    assert format_change(1.0, last) == text


def test_the_first_sentence_says_whether_training_worked(tmp_path: Path) -> None:
    closer = verdict_of(write_evals(tmp_path / "a", {"reverse_kl": 2.0}, {"reverse_kl": 1.9}))
    assert closer.summary == "Training worked: 10 steps of topk_pg, and the student came closer to the teacher."
    assert closer.headline == "KL(student ‖ teacher) fell from 2 to 1.9 nats a token (−5.0 %)"
    worse = verdict_of(write_evals(tmp_path / "b", {"reverse_kl": 1.9}, {"reverse_kl": 2.0}))
    assert worse.summary.startswith("Training did not work: 10 steps of topk_pg, and the student is farther from ")
    same = verdict_of(write_evals(tmp_path / "c", {"reverse_kl": 2.0}, {"reverse_kl": 2.0}))
    assert same.summary.startswith("No change: ")
    assert same.headline == "KL(student ‖ teacher) stayed at 2 nats a token"
    once = verdict_of(write_evals(tmp_path / "d", {"reverse_kl": 2.0}))
    assert once.summary.startswith("Not known yet whether training works: ")
    running = verdict_of(write_run(tmp_path / "e", done=20))
    assert running.summary.startswith("Training worked so far: 20 of 60 steps of topk_pg, and ")
    assert verdict_of(write_run(tmp_path / "f", done=0)).summary


def test_a_noisy_estimate_that_ends_a_little_lower_is_within_noise(tmp_path: Path) -> None:
    verdict = verdict_of(write_estimates(tmp_path / "a", [2.0, 1.6, 2.1, 1.7, 1.9]))
    assert verdict.summary.startswith("No clear change: 5 steps of topk_pg, and ")
    assert verdict.headline.endswith(" fell from 2 to 1.9 nats a token (−5.0 %, within noise)")
    steady = verdict_of(write_estimates(tmp_path / "b", [2.0, 1.8, 1.6, 1.4, 1.2]))
    assert steady.summary.startswith("Training worked: ")
    assert steady.headline.endswith(" fell from 2 to 1.2 nats a token (−40 %)")


def test_completions_that_the_student_did_not_draw_do_not_say_whether_training_worked(tmp_path: Path) -> None:
    verdict = verdict_of(write_estimates(tmp_path / "a", [2.0, 1.0], staleness=None))
    assert verdict.summary.startswith("Not known whether training worked: 2 steps of topk_pg on completions that it ")


def test_shares_say_of_how_many_they_are_and_where_their_change_is_noise(tmp_path: Path) -> None:
    first, last = ({"reverse_kl": 2.0 - n, "agreement": 0.5 + n / 100, "eval_tokens": 400} for n in (0, 1))
    facts = facts_of(write_evals(tmp_path / "a", first, last))
    assert facts["Same top token"] == ("51.0 %", "from 50.0 %, within noise (of 400 positions)")
    last = last | {"agreement": 0.9}
    facts = facts_of(write_evals(tmp_path / "b", first, last))
    assert facts["Same top token"] == ("90.0 %", "from 50.0 % (of 400 positions)")


def test_the_interval_of_a_share_stays_in_zero_to_one(tmp_path: Path) -> None:
    paths = []
    for seed, share in enumerate((0.99, 0.6)):
        record = {"reverse_kl": 1.0, "agreement": share, "accuracy": 1 - share}
        paths.append(write_evals(tmp_path / f"{seed}", record, record))
    assert compute_interval([0.99, 0.6]).high > 1.0
    summary = build_content(gather(paths)).summary
    row = dict(zip(summary.columns, summary.rows[0], strict=True))
    assert row["same top token"] == "79.5 % [0.0 %, 100.0 %]"
    assert row["accuracy"] == "20.5 % [0.0 %, 100.0 %]"


def test_several_runs_say_in_how_many_of_them_training_worked(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"{seed}", seed=seed) for seed in range(3)]
    assert verdict_of(*paths).summary.startswith("Training worked in 3 of 3 runs of topk_pg: the student came closer")
    summary = verdict_of(write_comparison(tmp_path / "cmp")).summary
    assert summary.startswith("4 settings were compared in 12 runs: top-20 did best. In all of them the student came ")
    unfinished = verdict_of(write_comparison(tmp_path / "part", finished=False)).summary
    assert unfinished == "The comparison of 4 settings is not finished."


def test_the_page_shows_what_the_student_wrote_first_and_last(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", rollouts=3)
    texts = build_content(gather([path])).completions
    assert [text.title for text in texts] == ["Student, at step 1", "Student, at step 3"]
    assert texts[0].text.endswith(" sat\u00e9 on a mat. end…")
    page = build_content(gather([path]))
    html = render_page(page)
    assert html.index("What the student wrote") < html.index('id="charts"')
    assert "<script>window.pwned" not in html.split('id="completions"')[1].split('id="charts"')[0]
    demo = {"prompt": "def f(", "student before": "x", "student after": "self):", "teacher": "self, x):"}
    (path / "demo.json").write_text(json.dumps(demo))
    texts = build_content(gather([path])).completions
    assert [(text.title, text.text) for text in texts] == [
        ("Student, before training", "x"),
        ("Student, after training", "self):"),
        ("Teacher", "self, x):"),
    ]
    (path / "demo.json").write_text("")  # as it is until the demo ends
    assert build_content(gather([path])).completions == []


def test_completions_that_the_student_did_not_draw_are_not_called_its_own(tmp_path: Path) -> None:
    assert build_content(gather([write_estimates(tmp_path / "a", [2.0, 1.0], staleness=None)])).completions == []


def test_a_chart_of_one_value_throughout_is_folded_away(tmp_path: Path) -> None:
    sections = build_content(gather([write_run(tmp_path / "run")])).data["sections"]
    constant = {panel["key"]: panel.get("constant", False) for section in sections for panel in section["panels"]}
    assert constant["lr"]
    assert constant["accuracy"]
    assert not constant["reverse_kl"]
    assert not constant["kl_k1"]


def test_the_state_of_a_run_says_whether_rollouts_can_be_there(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    page = build_content(gather([tmp_path / "new"], waiting=True), live=True)
    assert page.data["state"]["steps"] == 0
    assert "No rollouts were recorded" not in render_page(page, live=True).split("<script>")[0]
