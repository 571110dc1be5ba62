"""The page that lists every module is the one its script writes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_tree_page_lists_every_module_as_it_is_now():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "tree.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
