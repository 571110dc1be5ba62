"""The commands compute what they computed when ``tests/golden/runs/house.json`` was recorded, to the last digit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute and a half, and minutes more where the demo's models are yet to be trained
def test_demo_train_replay_and_score_repeat_their_recorded_numbers() -> None:
    script, golden = ROOT / "scripts" / "golden_runs.py", ROOT / "tests" / "golden" / "runs" / "house.json"
    done = subprocess.run(
        [sys.executable, str(script), "check", str(golden)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
