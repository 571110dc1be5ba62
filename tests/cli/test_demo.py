"""What the demo says at its end and when it is stopped: lines to type as they stand, and where things lie."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from topkd.cli.commands.demo import list_next_steps, print_stopped_and_exit
from topkd.compose.train import RunResult

RUN = Path("runs/demo/first-run/run.toml")


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A folder with an environment as make leaves it, which is not active."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "topkd", "activate"):
        (tmp_path / ".venv" / "bin" / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / ".venv" / "bin"


def typed(lines):
    return [line.strip() for line in lines if line.startswith(" ")]


COMMANDS = [
    "topkd serve runs/demo/first-run/teacher --port 8000",
    "topkd train runs/demo/first-run/run.toml --out runs/first",
    "topkd report runs/first",
]


def test_where_make_ran_the_demo_each_terminal_begins_with_the_environment(environment, monkeypatch):
    activate = "source .venv/bin/activate"
    assert typed(list_next_steps(RUN)) == [activate, COMMANDS[0], activate, *COMMANDS[1:]]
    (environment / "topkd").chmod(0o755)
    monkeypatch.setenv("PATH", str(environment))
    assert typed(list_next_steps(RUN)) == COMMANDS


def test_without_an_environment_to_activate_the_commands_name_the_script(environment):
    (environment / "activate").unlink()
    assert typed(list_next_steps(RUN)) == [f".venv/bin/{command}" for command in COMMANDS]


def test_a_run_that_is_there_already_is_not_offered_again_and_a_folder_with_spaces_is_quoted(environment):
    (environment.parent.parent / "runs" / "first").mkdir(parents=True)
    (environment.parent.parent / "runs" / "first" / "metrics.jsonl").touch()
    lines = list_next_steps(Path("my runs/run.toml"))
    assert typed(lines)[-2:] == ["topkd train 'my runs/run.toml' --out runs/first-2", "topkd report runs/first-2"]
    assert lines[-1] == "Then open runs/first-2/report.html in a browser."


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 0)])
@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([{}, {}], "step 2; run log and student so far: runs/a (topkd report runs/a)"),
        ([], "step 0; runs/a has no step yet"),
    ],
)
def test_a_stopped_demo_says_what_was_kept_and_where(capsys, name, code, steps, kept):
    with pytest.raises(typer.Exit) as left:
        print_stopped_and_exit(RunResult(Path("runs/a"), steps, [], stopped=name))
    assert left.value.exit_code == code
    assert kept in capsys.readouterr().err


SMALL = """
import sys
from topkd.cli.app import main
from topkd.compose.demo_assets import assets

assets.CORPUS_BYTES, assets.HELD_OUT_TOKENS = 200_000, 5_000
assets.TEACHER = {"hidden": 16, "layers": 1, "heads": 1, "steps": 1_000_000, "batch": 2}
sys.argv = ["topkd", "demo"]
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_the_models_are_made_leaves_nothing_and_says_so(tmp_path, number, code):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CI": "true"}
    command = [sys.executable, "-c", SMALL]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        said = []
        while not said or not said[-1].startswith("train the teacher: 1/"):
            said.append(process.stderr.readline())
            assert said[-1], said
        process.send_signal(number)
        said += process.stderr
    assert process.returncode == code, said
    assert any("stopped before the first step: nothing was kept" in line for line in said)
    assert "Traceback" not in "".join(said)
    assert [path.name for path in (tmp_path / "cache" / "topkd" / "demo").iterdir()] == [".lock"]
    assert list((tmp_path / "runs").iterdir()) == []
