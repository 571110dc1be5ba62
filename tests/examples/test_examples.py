"""Every example runs as its docstring says, and the student learns what the example is about."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from topkd.engine.loop.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(
    path.stem for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)
# How much the share of right answers rises at least; each rises by half as much again.
LEARNS = {
    "custom_objective": 0.2,
    "entropy_aware": 0.3,
    "lora_sync": 0.25,
    "multi_teacher": 0.25,
    "remote_teacher": 0.2,
    "self_distillation_feedback": 0.1,
    "self_distillation_hints": 0.3,
    "served_student": 0.4,
    "taid_schedule": 0.5,
}


def test_every_example_has_its_test_and_says_how_it_is_run():
    assert set(EXAMPLES) == set(LEARNS)
    for name in EXAMPLES:
        assert f"python examples/{name}.py" in (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_its_student_learns(name, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::DeprecationWarning:__main__",
            str(ROOT / "examples" / f"{name}.py"),
            str(tmp_path),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl", "eval")
    evals = [record for record in records if record.get("prefixes", "fixed") == "fixed"]
    assert evals[-1]["accuracy"] >= evals[0]["accuracy"] + LEARNS[name], done.stdout
    assert f"step {evals[-1]['step']:>4}" in done.stdout
