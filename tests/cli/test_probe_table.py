"""What ``topkd probe`` prints: a table for an 80-column terminal, the verdict as its last line, JSON on demand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.clients.probing import served
from tests.clients.vllm_toy import VllmToy
from topkd.cli.app import app
from topkd.cli.commands.probe import print_probe
from topkd.clients.probe.findings import Capabilities, Finding, Load, LoadLevel, ProbeReport
from topkd.topk.errors import ConfigError

MODEL = "/somewhere/deep/in/a/home/checkpoints/step-00012000/teacher"


def printed(report: ProbeReport, width: int = 80) -> list[str]:
    out = io.StringIO()
    print_probe(report, Console(file=out, width=width, highlight=False))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def made(
    *findings: Finding, can_teach: bool = True, verdict: str = "can teach: K <= 20", **more: object
) -> ProbeReport:
    return ProbeReport(
        url="http://h:8000", model="t", dialect="vllm", can_teach=can_teach, verdict=verdict,
        capabilities=Capabilities(score_k=20), findings=findings, requests=3, seconds=1.25, **more,
    )  # fmt: skip


def test_the_table_fits_a_narrow_terminal_and_a_long_name_is_not_cut_into_pieces():
    report = made(
        Finding("model", "server", "model", "info", MODEL, ""),
        Finding("k_max", "scoring", "largest K", "ok", "20", "confirmed on 47 rows"),
        Finding("sync", "operation", "new weights", "warn", "4 ways", "mounted, not called: " + "LoRA adapters, " * 5),
    )
    lines = printed(report)
    assert max(map(len, lines)) <= 80
    assert f"{'· model':<46}{MODEL[:34]}" in lines, "in the wide column, from its beginning"
    assert f"{'':<46}{MODEL[34:]}" in lines
    assert f"{'✓ largest K':<27}{'20':<19}confirmed on 47 rows" in lines
    assert lines[-1] == "can teach: K <= 20"


def test_each_group_is_headed_once_and_a_load_has_its_own_table():
    level = LoadLevel(concurrency=4, requests=8, failed=2, tokens_per_s=1234.5, p50_s=0.25, p95_s=0.5)
    load = Load(
        prompt_tokens=64, k=20, levels=(level,), best=4, tokens_per_s=1234.5, batch=10, steps_per_hour=6944.0,
        saturated=False,
    )  # fmt: skip
    findings = [Finding(f"f{i}", group, "x", "ok", "y", "") for i, group in enumerate(["server", "server", "scoring"])]
    lines = printed(made(*findings, load=load, advice=("--max-logprobs 64: more",)))
    assert [line for line in lines if line.strip() in {"SERVER", "SCORING"}] == ["  SERVER", "  SCORING"]
    assert any(line.split() == ["4", "1,234", "0.25", "s", "0.50", "s", "2"] for line in lines)
    assert "advice: --max-logprobs 64: more" in lines
    assert "not saturated" in " ".join(lines)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_teacher_exits_0_and_a_server_that_scores_nothing_exits_1(as_json: bool):
    def deaf(method: str, path: str, body: object) -> tuple[int, object]:
        return toy(method, path, {k: v for k, v in body.items() if k != "prompt_logprobs"} if body else body)

    toy = VllmToy(generate=False)
    for handler, code, words in ((toy, 0, "can teach: K <= "), (deaf, 1, "cannot teach: ")):
        with served(handler) as url:
            done = CliRunner().invoke(app, ["probe", url, *["--json"] * as_json])
        assert done.exit_code == code, done.output
        said = json.loads(done.stdout)["verdict"] if as_json else done.stdout.splitlines()[-1]
        assert said.startswith(words)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_recording_is_named_in_the_last_line_with_what_to_look_over(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TEACHER_KEY", "a-key-of-the-teacher")
    folder = tmp_path / "recording"
    options = ["--record", str(folder), "--api-key-env", "TEACHER_KEY"]
    with served(VllmToy()) as url:
        done = CliRunner().invoke(app, ["probe", url, *options, *(["--json"] if as_json else [])])
        again = CliRunner().invoke(app, ["probe", url, *options])
    assert done.exit_code == 0, done.output
    [*table, last] = (done.stderr if as_json else done.stdout).rstrip().splitlines()
    files = sorted(path.name for path in folder.iterdir())
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert last.startswith(f"recorded {len(files) - 1} exchanges in {folder} ({size / 1e6:.1f} MB): ")
    assert "look over what the server states of itself" in last
    assert "the prompts are topkd's own" in last
    if as_json:
        assert json.loads(done.stdout)["can_teach"]
    else:
        assert table[-1].startswith("can teach: K <= 20")
    assert b"a-key-of-the-teacher" not in b"".join(path.read_bytes() for path in folder.iterdir())
    assert isinstance(again.exception, ConfigError)
    assert "must be new or empty" in str(again.exception)
    assert "recorded" not in again.stderr, "not what the first one recorded"


def test_a_recording_of_a_probe_that_fails_is_named_before_the_error(tmp_path: Path):
    with served(lambda *_: (401, {"detail": "who are you?"})) as url:
        done = CliRunner().invoke(app, ["probe", url, "--record", str(tmp_path / "r")])
    assert done.exit_code != 0
    assert done.stderr.startswith(f"recorded {len(list((tmp_path / 'r').glob('0*')))} exchanges in ")
    assert "AuthError" in json.loads((tmp_path / "r" / "manifest.json").read_text())["error"]
