"""What every test of the clients starts from."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_reports_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
