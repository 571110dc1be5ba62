"""What the package promises to who installs it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def _stated() -> list[tuple[str, Requirement]]:
    rows = [("core", Requirement(line)) for line in PROJECT["dependencies"]]
    rows += [(extra, Requirement(line)) for extra, lines in EXTRAS.items() for line in lines]
    return [(group, requirement) for group, requirement in rows if requirement.name != "topkd"]


EVERY_NAME = "from topkd import *; from topkd.topk import *; from topkd.clients import *; from topkd.offline import *"
HANDLES = "from topkd.engine import *; from topkd.serve import ServeConfig, ServerProcess"


@pytest.mark.parametrize(
    "statement",
    ["import topkd, topkd.clients, topkd.offline", "import topkd.cli", EVERY_NAME, HANDLES],
)
def test_importing_the_light_parts_loads_no_learning_framework(statement: str) -> None:
    heavy = {"torch", "vllm", "transformers", "ray", "matplotlib", "datasets"}
    code = f"import sys\n{statement}\nprint(sorted({heavy} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_score_over_plain_http_loads_neither_httpx_nor_numba() -> None:
    """They cost more CPU time than scoring a few hundred short sequences."""
    code = """
import asyncio, sys
from tests.faults.server import FaultyServer
from topkd.clients import VllmCompletions

async def score():
    async with FaultyServer() as server, VllmCompletions(server.url, model="t") as client:
        await client.score(list(range(100, 400)), 0, 20)
        print(client.metrics["decoded_fast"], sorted({"httpx", "numba"} & sys.modules.keys()))

asyncio.run(score())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "1.0 []"


def test_every_dependency_has_its_reason_in_the_documents() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = {match[1].lower() for match in re.finditer(r"^\| `([\w.\[\]-]+)`", page, flags=re.MULTILINE)}
    stated = {requirement.name.lower() for _, requirement in _stated()}
    assert stated - rows == set(), "dependencies without a row in docs/dependencies.md"
    assert rows - stated - {"hatchling"} == set(), "rows of docs/dependencies.md that nothing depends on"


def test_what_make_installs_is_pinned_within_the_ranges_that_the_package_states() -> None:
    ranges = {requirement.name.lower(): requirement.specifier for _, requirement in _stated()}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    elsewhere = {"track", "tinker", "vllm"}  # extras that no make target installs
    wanted = {requirement.name.lower() for extra, requirement in _stated() if extra not in elsewhere}
    assert wanted - {pin.name.lower() for pin in pins} == set(), "installed by make, and not pinned"
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        allowed = ranges.get(pin.name.lower())
        assert allowed is None or allowed.contains(exact.version), f"{pin} is outside what pyproject.toml allows"


def test_every_extra_that_another_extra_names_exists() -> None:
    own = {
        extra
        for lines in EXTRAS.values()
        for line in lines
        if line.startswith("topkd[")
        for extra in Requirement(line).extras
    }
    assert own <= EXTRAS.keys()


def test_the_installed_version_is_the_one_in_the_source() -> None:
    text = (ROOT / "topkd" / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)[1] == version("topkd")
