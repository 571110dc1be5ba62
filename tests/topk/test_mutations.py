"""The mutation check of the maths: the list is whole (fast), and every mutation is killed (slow)."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "mutate_maths.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_every_mutation_still_finds_the_text_it_breaks() -> None:
    done = run("--list")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) >= 110


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_mutation_is_killed() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SURVIVED" not in done.stdout
