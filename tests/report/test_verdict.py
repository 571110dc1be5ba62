"""The verdict says what the numbers say: a winner only where the paired interval leaves out zero."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.report.made import write_comparison, write_run
from topkd.compose.run.folder import lock_folder
from topkd.report.load.collection import gather
from topkd.report.page.content import build_content
from topkd.report.page.html import render_page


def page_of(*paths: Path):
    return build_content(gather(paths))


def test_one_run_tells_where_its_kl_began_and_ended(tmp_path: Path) -> None:
    said = page_of(write_run(tmp_path / "run")).verdict
    assert said.summary == "Training worked: 60 steps of topk_pg, and the student came closer to the teacher."
    assert said.headline == "KL(student ‖ teacher) fell from 2 to 1.5 nats a token (−25 %)"
    facts = {label: (value, remark) for label, value, remark in said.facts}
    assert facts["Tokens trained on"] == ("6,000", "")
    assert facts["Teacher scored"] == ("7,200", "tokens, 240 requests")
    assert facts["Time"] == ("30 s", "")
    assert facts["Same top token"] == ("62.5 %", "from 50.0 %")


def test_the_winner_is_named_with_the_paired_difference_and_its_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    paths, ends = [], {}
    for kind in ("scalar_kl", "topk_pg"):
        for seed in range(4):
            path = write_run(tmp_path / f"{kind}{seed}", kind, seed=seed)
            end = 1.5 + (0.2 if kind == "scalar_kl" else 0.0) + 0.3 * seed + float(rng.normal(0, 0.01))
            ends[kind, seed] = end
            with (path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "eval", "step": 60, "reverse_kl": end}) + "\n")
            paths.append(path)
    said = page_of(*paths).verdict
    gaps = np.array([ends["scalar_kl", seed] - ends["topk_pg", seed] for seed in range(4)])
    best, worse = said.ranks
    assert (best.label, worse.label) == ("topk_pg", "scalar_kl")
    assert worse.difference is not None
    assert worse.difference.mean == pytest.approx(gaps.mean())
    half = 3.1824 * gaps.std(ddof=1) / 2
    assert (worse.difference.low, worse.difference.high) == pytest.approx((gaps.mean() - half, gaps.mean() + half))
    assert said.headline == f"topk_pg wins: KL(student ‖ teacher) lower by {gaps.mean():.4g} nats a token"
    assert said.tone == "won"
    assert any(warning.startswith("4 seeds per setting") for warning in said.warnings)


def test_an_interval_that_holds_zero_names_no_winner(tmp_path: Path) -> None:
    paths = []
    for kind, ends in (("scalar_kl", (1.0, 1.4, 1.2)), ("topk_pg", (1.1, 1.2, 1.25))):
        for seed, end in enumerate(ends):
            path = write_run(tmp_path / f"{kind}{seed}", kind, seed=seed)
            with (path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "eval", "step": 60, "reverse_kl": end}) + "\n")
            paths.append(path)
    said = page_of(*paths).verdict
    assert said.tone == "open"
    assert said.headline == "No clear winner between topk_pg and scalar_kl"


def test_an_arm_further_down_that_cannot_be_told_from_the_best_leaves_no_winner(tmp_path: Path) -> None:
    paths = []
    for kind, ends in (("topk_pg", (1.0, 1.1)), ("gjs", (1.2, 1.3)), ("scalar_kl", (1.0, 1.6))):
        for seed, end in enumerate(ends):
            path = write_run(tmp_path / f"{kind}{seed}", kind, seed=seed)
            with (path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "eval", "step": 60, "reverse_kl": end}) + "\n")
            paths.append(path)
    said = page_of(*paths).verdict
    assert [rank.label for rank in said.ranks] == ["topk_pg", "gjs", "scalar_kl"]
    assert said.ranks[1].difference.low > 0.0
    assert said.headline == "No clear winner between topk_pg and scalar_kl"


def test_one_draw_of_each_is_not_called_a_win(tmp_path: Path) -> None:
    said = page_of(write_run(tmp_path / "a", "scalar_kl"), write_run(tmp_path / "b", "topk_pg")).verdict
    assert said.tone == "open"
    assert "this may be chance" in said.headline
    assert "no paired interval" in said.detail


def test_a_comparisons_own_verdict_goes_first_and_replays_are_ranked_nowhere(tmp_path: Path) -> None:
    page = page_of(write_comparison(tmp_path / "cmp"))
    assert page.verdict.headline.startswith("top-20 wins: its area under KL(student ‖ teacher) is 0.921 (0.920 to ")
    assert page.verdict.tone == "won"
    assert page.verdict.detail.startswith("top-20 also ends lowest: its last value is 0.832 (0.830 to 0.835) of the ")
    assert page.verdict.detail.endswith("Last values, nats a token: top-20 1.49, sampled token 1.79.")
    assert [rank.label for rank in page.verdict.ranks] == ["top-20", "sampled token"]
    assert [group["label"] for group in page.data["groups"] if group["apart"]] == [
        "sampled token, replayed",
        "top-20, replayed",
    ]
    live, replay, tuning, prefixes, training = page.more
    assert live.title == "Compared on-policy, live"
    assert "off-policy test" in replay.title
    assert replay.note.startswith("On replayed rollouts: top-20 wins: ")
    assert live.rows[1][:5] == ["top-20", "0.001", "0.8725 (sd 0.0025)", "0.921 [0.920, 0.921]", "0.832 [0.830, 0.835]"]
    assert live.rows[0][5] == "1,945 (2 of 3 never)"
    assert (live.rows[0][6], live.rows[1][6]) == ("reference", "0.423 (1 of 3 pairs)")
    assert tuning.columns == ["arm", "0.0003", "0.001", "0.003", "0.01", "chosen"]
    assert tuning.rows[0] == ["sampled token", "0.97", "0.93", "0.95", "failed", "0.001"]
    assert (0, 2) in tuning.marked
    assert "The grid was 0.0003, 0.001, 0.003; it was extended" in tuning.note
    assert [row[:3] for row in prefixes.rows][2] == [
        "fresh: written by the student",
        "top-20",
        "1.59 [1.565, 1.615]",
    ]
    said = dict(zip(training.columns, training.rows[0], strict=True))
    assert said["setting"] == "top-20"
    assert said["tokens per step"] == "100"
    assert said["completion length"] == "25 → 25"


def test_a_control_stands_behind_the_arms_it_outdoes_and_no_pair_is_taken_against_it(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    told = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    told["arms"][1]["control"] = True
    (folder / "compare.json").write_text(json.dumps(told), encoding="utf-8")
    page = page_of(folder)
    assert [(rank.label, rank.control) for rank in page.verdict.ranks] == [("sampled token", False), ("top-20", True)]
    assert page.verdict.ranks[1].difference.high < 0.0
    for measure in page.data["seeds"]:
        assert [row["label"] for row in measure["strips"][0]["rows"]] == ["sampled token", "top-20"]
        assert [row["label"].removeprefix("against ") for row in measure["strips"][1]["rows"]] == ["top-20"]


def test_on_the_embedded_pair_a_cut_completion_is_explained_and_not_warned_about(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    for run_log in folder.glob("cells/*/metrics.jsonl"):
        run_log.write_text(run_log.read_text().replace('"truncated": 1,', '"truncated": 4,'))
    page = page_of(folder)
    assert not any("cut at the length limit" in warning for warning in page.verdict.warnings)
    assert any("no stop token" in note for note in page.notes)
    summary = json.loads((folder / "compare.json").read_text()) | {"base": "run.toml"}
    (folder / "compare.json").write_text(json.dumps(summary))
    assert any("cut at the length limit" in warning for warning in page_of(folder).verdict.warnings)


def test_a_failed_cell_is_in_no_verdict_and_is_named(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    summary = json.loads((folder / "compare.json").read_text())
    summary["cells"][0]["status"] = "failed"
    summary["cells"].append({"id": "live-x-seed0", "arm": "x", "seed": 0, "status": "failed", "run": "cells/none"})
    (folder / "compare.json").write_text(json.dumps(summary))
    said = page_of(folder).verdict
    ranks = {rank.label: rank for rank in said.ranks}
    assert [one["seed"] for one in ranks["sampled token"].values] == [1, 2]
    assert any("live-scalar_kl-seed0 failed" in warning for warning in said.warnings)
    assert any("live-x-seed0" in warning for warning in said.warnings)


def test_without_an_exact_kl_the_verdict_says_that_it_rests_on_an_estimate(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    lines = [line for line in (path / "metrics.jsonl").read_text().splitlines() if '"eval"' not in line]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    said = page_of(path).verdict
    assert said.headline.startswith("estimated KL(student ‖ teacher) fell from 1.9")
    assert "is based on the estimate" in said.warnings[0]


def test_what_a_careful_reader_would_ask_is_warned_about(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", done=10)
    more = [
        {"kind": "step", "step": 11, "tokens": 0, "skipped": "non-finite gradient", "lost": {"ServerBusyError": 3},
         "samples": 1, "truncated": 1, "missing_tokens": 7, "completion_tokens": 100, "ess": 0.1},
        {"kind": "eval", "step": 11, "reverse_kl": 3.0},
        {"kind": "event", "event": "alarm", "alarm": "mismatch_kl", "step": 11, "value": 0.5, "limit": 0.02},
        {"kind": "event", "event": "stopped", "version": 11, "reason": "KeyboardInterrupt"},
    ]  # fmt: skip
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in more)
    text = "\n".join(page_of(path).verdict.warnings)
    for expected in (
        "stopped at step 11 of 60 (KeyboardInterrupt)",
        "step 11: KL(sampler ‖ trainer) of the same weights was 0.5, beyond its limit of 0.02 (mismatch_kl): sample in",
        "3 of 44 samples were lost",
        "1 of 11 steps changed no weight",
        "7 tokens (0.64 %) had no teacher logprob",
        "it was better before",
    ):
        assert expected in text


@pytest.mark.parametrize(("limit", "meant"), [(32, True), (1024, False)])
def test_a_short_limit_that_cuts_is_a_note_and_a_long_one_a_warning_with_what_helps(
    tmp_path: Path, limit: int, meant: bool
) -> None:
    path = write_run(tmp_path / "run")
    config = json.loads((path / "config.json").read_text()) | {"rollout": {"max_completion_tokens": limit}}
    (path / "config.json").write_text(json.dumps(config))
    run_log = path / "metrics.jsonl"
    alarm = {"kind": "event", "event": "alarm", "alarm": "truncation_rate", "step": 5, "value": 1.0, "limit": 0.5}
    run_log.write_text(run_log.read_text().replace('"truncated": 1,', '"truncated": 4,') + json.dumps(alarm) + "\n")
    page = page_of(path)
    warned = [warning for warning in page.verdict.warnings if "cut at" in warning]
    noted = [note for note in page.notes if "max_completion_tokens = 32" in note]
    assert (len(warned), len(noted)) == ((0, 1) if meant else (1, 0))
    if not meant:
        assert warned[0].startswith("step 5: the share of completions cut at their limit was 1, beyond")
        assert "raise rollout.max_completion_tokens" in warned[0]


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((-1.448, -1.315), "rose from −1.448 to −1.315 nats a token"),
        ((5.6e-09, -6.0e-07), "fell from 5.6e−09 to −6e−07 nats a token"),
        ((0.0, 0.5), "rose from 0 to 0.5 nats a token"),
        ((2.0, 3.0), "rose from 2 to 3 nats a token (+50 %)"),
    ],
)
def test_a_change_from_or_to_what_is_not_above_zero_has_no_percentage(
    tmp_path: Path, ends: tuple[float, float], said: str
) -> None:
    path = write_run(tmp_path / "run")
    evals = [{"kind": "eval", "step": step, "reverse_kl": kl} for step, kl in zip((0, 60), ends, strict=True)]
    with without_evals(path).joinpath("metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in evals)
    assert page_of(path).verdict.headline == f"KL(student ‖ teacher) {said}"


def test_one_look_is_no_change(tmp_path: Path) -> None:
    said = page_of(write_run(tmp_path / "run", done=5)).verdict
    assert said.headline == "KL(student ‖ teacher) is 2 nats a token at the first measurement"
    assert "5 of 60 steps, running" in said.detail


def test_before_the_first_step_the_page_waits(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert build_content(gather([tmp_path / "run"], waiting=True)).verdict.tone == "waiting"


def without_evals(path: Path, change=dict) -> Path:
    """The run's run log without its evaluations, each step changed."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [change(record) for record in records if record["kind"] != "eval"]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return path


def test_a_run_on_data_alone_is_judged_by_its_training_loss_and_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path / "sft", drop=("kl_k1",))
    page = page_of(without_evals(path, lambda one: one | {"sft_loss": 3.0 - one.get("step", 0) / 60}))
    assert page.verdict.headline == "−log p of the data fell from 2.942 to 2.042 nats a token (−31 %)"
    assert page.verdict.detail.startswith("On the data that it trained on; 60 of 60 steps")
    assert "is based on the training loss on the data" in page.verdict.warnings[0]
    assert "sft_loss" in {panel["key"] for section in page.data["sections"] for panel in section["panels"]}


def test_steps_that_measure_nothing_are_not_waited_for(tmp_path: Path) -> None:
    said = page_of(without_evals(write_run(tmp_path / "run", drop=("kl_k1", "sft_loss")))).verdict
    assert said.headline == "Nothing in the run log measures the distance between student and teacher"
    assert said.detail.startswith("60 steps")


def test_an_unfinished_run_that_has_long_been_silent_is_asked_about(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", done=20)
    assert page_of(path).verdict.warnings == []
    hours_ago = time.time() - 3 * 3600
    os.utime(path / "metrics.jsonl", (hours_ago, hours_ago))
    assert page_of(path).verdict.warnings == [
        "unfinished, and nothing was written for 3 hours: was it killed? (--resume continues from a checkpoint)"
    ]
    cells = write_comparison(tmp_path / "cmp", finished=False) / "cells"
    write_run(cells / "live-topk_pg-seed0", steps=20, done=5)
    os.utime(cells / "live-topk_pg-seed0" / "metrics.jsonl", (hours_ago, hours_ago))
    (killed,) = (warning for warning in page_of(cells.parent).verdict.warnings if "killed" in warning)
    assert killed.endswith("written for 3 hours: was it killed? (run the same topkd compare again)")
    finished = write_run(tmp_path / "finished")
    os.utime(finished / "metrics.jsonl", (hours_ago, hours_ago))
    assert page_of(finished).verdict.warnings == []


def test_a_run_whose_process_is_gone_is_unfinished_at_once_and_counts_beside_no_other(tmp_path: Path) -> None:
    path, whole = write_run(tmp_path / "run", done=20), write_run(tmp_path / "whole", seed=1)
    with lock_folder(path):
        assert page_of(path).data["state"]["text"] == "running, step 20 of 60"
    page = page_of(path)
    assert page.data["state"] == {"running": 0, "steps": 20, "text": "unfinished, step 20 of 60"}
    assert page.verdict.detail.endswith("20 of 60 steps, unfinished.")
    (warned,) = page.verdict.warnings
    assert warned == (
        "ended at step 20 of 60 without a final record, and no process of this machine works on it: was it killed? "
        "(--resume continues from a checkpoint)"
    )
    assert "1 other run did not end as planned" in page_of(path, whole).verdict.detail
    for elsewhere in ("another.example", ""):  # copied while it runs there, or of a shared disk without locks
        (path / ".lock").write_text(elsewhere)
        assert page_of(path).data["state"]["text"] == "running, step 20 of 60"
    with lock_folder(whole):
        pass
    assert page_of(whole).data["state"]["text"] == "finished, step 60 of 60"


def test_a_small_untuned_comparison_says_so_under_its_headline(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp", seeds=2)
    told = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    assert page_of(folder).verdict.caveat == "A first look, not a result: 2 seeds per setting, 20 steps per run."
    told["tuned"] = None
    for arm in told["arms"]:
        arm["lr"] = None
    (folder / "compare.json").write_text(json.dumps(told), encoding="utf-8")
    page = page_of(folder)
    assert page.verdict.caveat == (
        "A first look, not a result: 2 seeds per setting, one learning rate for all, not tuned, 20 steps per run."
    )
    html = render_page(page)
    assert html.index('class="headline"') < html.index(page.verdict.caveat) < html.index('class="detail"')
    assert page_of(write_comparison(tmp_path / "more", seeds=4)).verdict.caveat == ""


def test_runs_of_one_seed_are_no_interval_over_seeds_and_stopped_ones_are_in_no_mean(tmp_path: Path) -> None:
    whole, stopped = write_run(tmp_path / "a"), write_run(tmp_path / "b", done=20)
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"kind": "event", "event": "stopped", "version": 20, "reason": "KeyboardInterrupt"}) + "\n"
        )
    said = page_of(whole, stopped).verdict
    assert said.headline == page_of(whole).verdict.headline
    assert said.detail.endswith("60 of 60 steps, finished. 1 other run did not end as planned and is not counted.")
    assert said.facts_of == "a"
    twice = page_of(whole, write_run(tmp_path / "c")).verdict
    assert twice.detail.startswith("Mean over 2 runs of topk_pg of which some share a seed: ")
    assert twice.facts_of == "means over runs"
    seeds = page_of(whole, write_run(tmp_path / "d", seed=1)).verdict
    assert seeds.detail == "Mean over 2 runs of topk_pg that differ in their seed, with the 95 % interval over them."
    copy = shutil.copytree(stopped, tmp_path / "e")
    assert page_of(stopped, copy).verdict.headline == "No run of topk_pg has ended as planned"
