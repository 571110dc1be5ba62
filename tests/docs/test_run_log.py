"""The run log's page names every event that the code can write."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_run_logs_page_has_a_row_for_every_event_and_for_no_other():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "topkd").rglob("*.py"))
    written = set(re.findall(r'"event": "(\w+)"', sources))
    page = (ROOT / "docs" / "run-log.md").read_text(encoding="utf-8").split("## Events")[1].split("## Alarms")[0]
    assert {"start", "resumed", "stopped", "alarm"} <= written
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) - {"event"} == written
