"""The command line as a user meets it: help, exit codes, one line on bad input, no traceback."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cache import fill
from tests.fakes.interrupts import interruptible
from topkd.cli.output.run_summary import resume_command


def topkd(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "topkd", *map(str, args)],
        capture_output=True,
        check=False,
        text=True,
        timeout=240,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100", **env},
    )


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["train"], ["serve"], ["score"], ["replay"], ["probe"], ["cache", "gc"]], ids=" ".join
)
def test_every_command_has_help_with_an_example(command):
    done = topkd(*command, "--help")
    assert done.returncode == 0
    assert not command or "Example: topkd" in done.stdout


def test_the_version_is_the_packages(capsys):
    import topkd as package

    assert topkd("--version").stdout.strip() == f"topkd {package.__version__}"


BAD = [
    (["train", "none.toml", "--out", "o"], "cannot read the config (none.toml): got No such file or directory"),
    (["train", "broken.toml", "--out", "o"], "the config is not TOML"),
    (["train", "unknown.toml", "--out", "o"], "unknown config key 'stepz' (unknown.toml); did you mean 'steps'?"),
    (["serve", "no/such/model"], "no/such/model"),
    (["score", "x" * 5000, "--teacher", "http://127.0.0.1:1", "--out", "o"], "xxx...): got File name too long"),
    (["serve", "m", "--api-key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE (--api-key-env) is not set"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.toml").write_text("steps = = 3")
    (tmp_path / "unknown.toml").write_text(
        "stepz = 3\n[student]\nmodel='m'\n[teacher]\nurl='http://127.0.0.1:1'\n[data]\npath='p'\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "topkd", *args],
        capture_output=True,
        check=False,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert message in last
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert last.startswith("topkd: error: ")


def test_a_name_that_the_terminal_cannot_show_is_shown_escaped(tmp_path):
    cache = fill(tmp_path / "\u2603", range(2))
    done = topkd("cache", "verify", cache, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2603: 2 records" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--objectiv", "gjs"], "No such option: --objectiv"),
        (["train", "run.toml"], "Missing option '--out'"),
        (["trian"], "No such command 'trian'"),
        (["demo", "--steps", "0"], "it must be greater than or equal to 1"),
        (["demo", "--steps", "few"], "'--steps': it must be a whole number; see topkd demo"),
        (["demo", "--objective", "kl"], "'--objective': 'kl' is not one of 'topk_pg', 'gjs', 'scalar_kl'"),
        (["train", "run.toml", "--out"], "Option '--out' requires an argument; see topkd train"),
        (["cache", "statz"], "No such command 'statz'. Did you mean 'stats'?; see topkd cache"),
    ],
)
def test_a_command_that_is_written_wrongly_is_one_line_with_exit_code_2(arguments, message):
    done = topkd(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("topkd: error: ")
    assert message in line
    assert line.endswith("--help")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("debug", [False, True])
def test_ctrl_c_is_one_line_and_exit_code_130(debug):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = [*(["--debug"] if debug else []), "probe", url]
        command = [sys.executable, "-m", "topkd", *words]
        process = interruptible(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        silent.settimeout(240)
        asked, _ = silent.accept()
        with asked:
            asked.recv(1)  # the command waits for an answer that never comes
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "topkd: stopped"
    assert ("Traceback" in err) == debug


def test_the_command_that_goes_on_is_the_one_that_was_given(tmp_path):
    line = resume_command(
        "replay", Path("a b.toml"), tmp_path, ["objective.kind=gjs", "data.path=my rows"], cache=Path("c")
    )
    assert shlex.split(line) == [
        "topkd", "replay", "a b.toml", "--cache", "c", "--out", str(tmp_path), "--set", "objective.kind=gjs",
        "--set", "data.path=my rows", "--resume",
    ]  # fmt: skip


def test_a_run_under_torchrun_goes_on_with_as_many_processes(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert resume_command("train", Path("run.toml"), Path("out"), []) == (
        "torchrun --nproc-per-node 4 -m topkd train run.toml --out out --resume"
    )
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert resume_command("train", Path("run.toml"), Path("out"), []).startswith(
        "torchrun --nnodes 2 --nproc-per-node 4 -m "
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("student.model=./nope", "error: no such model folder (./nope)"),
        ("data.path=nope.jsonl", "error: cannot read the data file (nope.jsonl)"),
    ],
)
def test_a_mistyped_path_of_a_run_is_told_before_torch_is_imported(tmp_path, wrong, words):
    (tmp_path / "student").mkdir()
    (tmp_path / "data.jsonl").write_text('{"prompt_ids": [1, 2]}\n')
    run = tmp_path / "run.toml"
    run.write_text(
        f'student = {{ model = "{tmp_path}/student" }}\nteacher = {{ url = "http://127.0.0.1:1" }}\n'
        f'data = {{ path = "{tmp_path}/data.jsonl" }}\n'
    )
    script = (
        "import atexit, sys\nfrom topkd.cli import main\n"
        "atexit.register(lambda: print('torch' in sys.modules))\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "train", str(run), "--out", str(tmp_path / "out"), "--set", wrong],
        capture_output=True, check=False, text=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
    assert "path is taken from" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.split() == ["False"]
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_code_run_from_text_is_exit_code_130_under_python_m_too(tmp_path):
    """A dataclass is made by such code, and Python itself dies of an interrupt there, caught or not."""
    (tmp_path / "asked.py").write_text(
        "import os, signal\n"
        "from topkd.cli import app\n"
        "app.app = lambda **_: exec('os.kill(os.getpid(), signal.SIGINT)\\nfor _ in range(10**6): pass')\n"
        "app.main()\n"
    )
    with interruptible(
        [sys.executable, "-m", "asked"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        out, said = process.communicate(timeout=240)
    assert (process.returncode, out, said) == (130, "", "topkd: stopped\n")
