"""The key of a run, used by every command and found in nothing that the run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.conftest import API_KEY
from tests.contract.servers import Endpoint


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path


def run(home: Path, *arguments: str, status: int = 0) -> str:
    """``topkd ARGUMENTS`` in a home of its own, the key in its environment only; everything it printed."""
    env = {name: value for name, value in os.environ.items() if name in {"PATH", "LANG", "OMP_NUM_THREADS"}}
    env |= {
        "HOME": str(home / "home"),
        "XDG_CACHE_HOME": str(home / "home"),
        "TEACHER_KEY": API_KEY,
        "WRONG_KEY": f"{API_KEY}-not",
    }
    done = subprocess.run(
        [sys.executable, "-m", "topkd", *arguments],
        cwd=home,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == status, printed
    (home / f"printed-{len(list(home.glob('printed-*')))}").write_text(printed)
    return printed


def assert_nothing_holds_the_key(home: Path, server: Endpoint) -> None:
    files = [path for path in home.rglob("*") if path.is_file()]
    assert len(files) > 3, "a search through nothing finds nothing"
    for path in [*files, server.log]:
        raw = path.read_bytes()
        assert API_KEY.encode() not in raw, path
        assert API_KEY not in str(path)


def rows(home: Path) -> str:
    lines = [{"prompt_ids": [5 + i, 9, 40], "completion_ids": [7, 8, 9 + i]} for i in range(6)]
    (home / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "rows.jsonl"


def test_probing_and_scoring_leave_the_key_nowhere(embedded: Endpoint, home: Path):
    key = ("--api-key-env", "TEACHER_KEY")
    assert json.loads(run(home, "probe", embedded.url, *key, "--json"))["can_teach"]
    assert "can teach" in run(home, "probe", embedded.url, *key, "--cached")
    scored = ("score", rows(home), "--teacher", embedded.url, "--api-key-env", "TEACHER_KEY", "--out", "cache")
    run(home, *scored, "--k", "8")
    # And when it fails: above the server's limit, at a model that is not there, with a key that is wrong.
    assert "64" in run(home, *scored, "--k", "100", status=2)
    run(home, *scored, "--model", "nobody", status=2)
    run(home, "probe", embedded.url, "--api-key-env", "WRONG_KEY", status=2)
    assert_nothing_holds_the_key(home, embedded)


@pytest.mark.slow
def test_training_leaves_the_key_nowhere(embedded: Endpoint, home: Path):
    prompts = [{"prompt_ids": [5 + i, 9, 40]} for i in range(4)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    (home / "run.toml").write_text(
        f"""
        steps = 1
        k = 8
        [student]
        model = {json.dumps(str(embedded.model_dir))}
        device = "cpu"
        [teacher]
        url = "{embedded.url}"
        api_key_env = "TEACHER_KEY"
        [data]
        path = "prompts.jsonl"
        [rollout]
        prompts_per_step = 2
        samples_per_prompt = 1
        max_completion_tokens = 4
        """
    )
    run(home, "train", "run.toml", "--out", "run")
    run(home, "train", "run.toml", "--out", "refused", "--set", "k=100", status=2)
    assert_nothing_holds_the_key(home, embedded)
