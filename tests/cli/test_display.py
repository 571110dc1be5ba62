"""What a finished run says on standard output, and what its bar shows."""

import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from topkd.cli.output.progress import Display, format_eta, print_result
from topkd.compose.train import RunResult
from topkd.engine.loop.metrics import make_strict_json
from topkd.report.load.collection import gather
from topkd.report.page.content import build_content

STEP = {"step": 3, "kl_k1": 0.0, "grad_norm": math.nan, "tokens": 40, "lost": {}}
CLOCKS = {"sample_s": 1.0, "score_wait_s": 0.5, "learn_s": 0.5}


def test_json_of_a_run_is_strict_whatever_its_numbers(capsys):
    print_result(RunResult(Path("runs/a"), [STEP], [{"step": 3, "reverse_kl": math.inf}]), "done", as_json=True)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    said = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert said["last_step"] == {**STEP, "grad_norm": None}
    assert said["evals"] == [{"step": 3, "reverse_kl": None}]


def write_log(folder: Path, *records: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"steps": len(records), "objective": {"kind": "gjs"}}))
    lines = [json.dumps({"kind": "step", **make_strict_json(record)}) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_finished_run_ends_in_the_words_of_its_report_and_says_where_it_lies(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = [{**STEP, "step": n, "kl_k1": value} for n, value in enumerate((2.0, 1.99, 1.0), 1)]
    run = write_log(Path("my run"), *records)
    print_result(RunResult(run, records, []), "done", as_json=False)
    summary, result, page = capsys.readouterr().out.splitlines()
    report = build_content(gather([run])).verdict
    assert summary == report.summary
    assert result == f"3 steps done; {report.headline}; student: my run/student, run log: my run/metrics.jsonl"
    assert page == "report: topkd report 'my run'"
    run = write_log(Path("a"), {**STEP, "step": 1, "kl_k1": 0.7989920601175624})
    print_result(RunResult(run, [{**STEP, "step": 1}], []), "replayed", as_json=False)
    assert "1 step replayed; estimated KL(student ‖ teacher) is 0.799 nats a token" in capsys.readouterr().out


def test_a_kl_of_exactly_zero_is_shown_as_zero_and_an_absent_one_as_what_there_is_instead(monkeypatch):
    seen = []
    display = Display(quiet=True)
    monkeypatch.setattr(display, "advance", lambda done, detail: seen.append(detail))
    display.record("step", {**STEP, **CLOCKS})
    unsampled = {key: value for key, value in {**STEP, **CLOCKS}.items() if key != "kl_k1"}
    display.record("step", unsampled)
    display.record("step", unsampled | {"sft_loss": 2.5})
    assert [detail.split("  ")[0] for detail in seen] == ["kl 0.000", "no signal", "-log p 2.500"]


def test_a_warm_start_on_data_ends_with_its_own_measure(tmp_path, capsys):
    records = [{"step": n, "sft_loss": loss, "tokens": 40} for n, loss in enumerate((3.0, 2.5), 1)]
    print_result(RunResult(write_log(tmp_path / "a", *records), records, []), "done", as_json=False)
    out = capsys.readouterr().out
    assert out.startswith("Training worked: 2 steps of gjs, and the student predicts the data better than before.\n")
    assert "−log p of the data fell from 3 to 2.5 nats a token (−17 %)" in out


@pytest.mark.parametrize(
    ("mass", "shown"),
    [
        (0.7, "done; The loss on the teacher's lists went from 6.5 to 5.25 nats;"),
        (math.nan, "done; Nothing in the run log measures the distance between student and teacher;"),
        (None, "done; Nothing in the run log measures"),
    ],
)
def test_a_replay_of_imported_lists_is_judged_by_its_loss_unless_they_list_nothing(tmp_path, capsys, mass, shown):
    records = [{**STEP, "step": n, "kl_k1": None, "loss": at, "teacher_mass": mass} for n, at in ((1, 6.5), (2, 5.25))]
    print_result(RunResult(write_log(tmp_path / "a", *records), records, []), "done", as_json=False)
    assert shown in capsys.readouterr().out


def test_in_80_columns_the_bar_gives_way_and_no_number_is_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("sys.stderr", screen := io.StringIO())
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    display = Display()
    assert display.live
    display.stage("train the teacher", 1500)
    display.record("step", {**STEP, **CLOCKS, "step": 1200, "kl_k1": 1.681, "tokens": 40_000, "lost": {"timeout": 12}})
    page = Console(width=80, file=io.StringIO())
    page.print(display._bars.get_renderable())
    (line,) = page.file.getvalue().splitlines()
    assert len(line) <= 80
    assert re.search(
        r"train the teacher .*1200/1500 \d:\d\d:\d\d [-:\d]{7} kl 1.681  20000 tok/s  lost 12$", line.rstrip()
    )


def test_away_from_a_terminal_there_are_plain_lines_and_no_escape_codes(capsys):
    with Display() as display:
        display.stage("distil", 2)
        display.record("step", {**STEP, **CLOCKS, "step": 1})
        display.record("step", {**STEP, **CLOCKS, "step": 2})
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"distil: 1/2 kl 0\.000  20 tok/s \(\d+ s\)\ndistil: 2/2 .*\n", said.err)


def test_plain_lines_say_how_long_a_stage_still_takes_at_its_own_pace(capsys, monkeypatch):
    monkeypatch.setenv("CI", "true")
    clock = iter([0.0, 100.0, 112.0, 124.0, 600.0])
    monkeypatch.setattr("topkd.cli.output.progress.time.monotonic", lambda: next(clock))
    display = Display()
    display.stage("train the teacher", 600)
    for done in (100, 130, 160, 600):  # the first call tells no pace: a resumed stage begins in its middle
        display.advance(done, "loss 5.4")
    assert capsys.readouterr().err.splitlines() == [
        "train the teacher: 100/600 loss 5.4 (100 s)",
        "train the teacher: 130/600 loss 5.4 (112 s, about 3 min left)",
        "train the teacher: 160/600 loss 5.4 (124 s, about 3 min left)",
        "train the teacher: 600/600 loss 5.4 (600 s)",
    ]
    assert format_eta(0, 0.0, 44, 88, 50.0) == ", about 50 s left"


def test_brackets_in_what_a_stage_tells_are_no_markup():
    display = Display()
    display.live = True
    display.stage("live runs", 2)
    display.advance(1, "live-a-seed0: no file there ([/data]): got [red]")
    console = Console(width=160)
    with console.capture() as shown:
        console.print(display._bars.get_renderable())
    assert "no file there ([/data]): got [red]" in shown.get()
