"""How a run that fails is to be gone on with, and when there is nothing to go on with."""

import json
import threading
import time
from pathlib import Path

import pytest
import typer

from tests.engine.pieces import model_folder
from topkd.cli.commands import train
from topkd.cli.output.run_summary import hint_resume, print_result_and_exit
from topkd.compose.run.run import RunResult
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import ConfigError, ServerUnreachableError

AGAIN = "topkd train run.toml --out run --resume"


def failing(out, *, written, error=ServerUnreachableError):
    def run():
        with hint_resume(out, AGAIN):
            if written:
                (out / "metrics.jsonl").write_text("{}\n")
            raise error("gone")

    with pytest.raises(error):
        run()


def test_only_a_run_that_kept_a_checkpoint_says_how_to_go_on(tmp_path, capsys):
    failing(tmp_path, written=True)
    assert capsys.readouterr().err == ""  # no checkpoint yet
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    failing(tmp_path, written=False, error=ConfigError)
    assert capsys.readouterr().err == ""  # it did not begin: the same command would fail again
    time.sleep(0.01)
    failing(tmp_path, written=True)
    assert capsys.readouterr().err == f"resume with: {AGAIN}\n"


def test_a_run_whose_server_dies_says_the_command_that_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "student", seed=1)
    Path("data.jsonl").write_text(json.dumps({"prompt_ids": [5, 6, 7]}) + "\n")
    with ServerProcess(ServeConfig(model="student", port=0, device="cpu")) as server:
        Path("run.toml").write_text(
            f'steps = 10000\nk = 2\n[student]\nmodel = "student"\ndevice = "cpu"\n[teacher]\nurl = "{server.url}"\n'
            '[data]\npath = "data.jsonl"\n[client]\nmax_retries = 1\nbackoff_s = 0.01\n'
            "[rollout]\nprompts_per_step = 1\nsamples_per_prompt = 1\nmax_completion_tokens = 2\n"
        )

        def end_it():
            run_log = Path("run/metrics.jsonl")
            while not run_log.exists() or b'{"kind": "step"' not in run_log.read_bytes():
                time.sleep(0.02)
            server.stop()

        killer = threading.Thread(target=end_it, daemon=True)
        killer.start()
        with pytest.raises(ServerUnreachableError):
            train.train_command(Path("run.toml"), Path("run"), overrides=["seed=3"])
        killer.join()
    said = capsys.readouterr().err
    assert "resume with: topkd train run.toml --out run --set seed=3 --resume" in said
    assert list(Path("run/checkpoints").glob("step-*"))


@pytest.mark.parametrize("kept", [False, True])
def test_a_stopped_run_without_a_checkpoint_says_that_it_starts_over(tmp_path, capsys, kept):
    if kept:
        (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    with pytest.raises(typer.Exit) as exit_:
        print_result_and_exit(RunResult(tmp_path, [], [], stopped="SIGINT"), "done", again=AGAIN, as_json=False)
    hint = "resume with" if kept else "there is no checkpoint: start over with"
    assert exit_.value.exit_code == 130
    assert capsys.readouterr().err == f"SIGINT: stopped after step 0; {hint}: {AGAIN}\n"
