"""``--watch``: the page of a run is there while it goes on, and gone afterwards."""

import json
import urllib.error
import urllib.request

import pytest

from topkd.cli.output.progress import Display
from topkd.cli.output.run_summary import serve_page

OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def test_the_page_follows_the_run_until_it_ends_and_only_when_wanted(tmp_path, monkeypatch):
    said = []
    display = Display(quiet=True)
    monkeypatch.setattr(display, "note", said.append)
    with serve_page(tmp_path, display, wanted=False):
        pass
    assert said == []
    with serve_page(tmp_path, display, wanted=True):
        url = said[0].removeprefix("follow the run at ")
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "step", "step": 1, "loss": 0.5}) + "\n")
        with OPEN(url) as reply:
            assert b"<html" in reply.read()
    with pytest.raises(urllib.error.URLError):
        OPEN(url, timeout=60)
