"""What the documents point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks_of, documents

_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)(?: \"[^\"]*\")?\)")
_MAKE = r"make ([a-z][a-z-]*(?: [a-z][a-z-]*)*)"
_PATH = re.compile(r"`((?:topkd|tests|docs|scripts|benchmarks|examples)/[\w./-]+)`")
_CASES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in documents()]


def _prose(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", _CASES)
def test_every_relative_link_leads_to_a_file_and_heading(path: Path) -> None:
    for match in _LINK.finditer(_prose(path)):
        target, _, heading = match["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{path.relative_to(ROOT)} links to {target}, which is not there"
        if heading and file.suffix == ".md":
            assert heading in _anchors(file), f"{path.relative_to(ROOT)} links to {match['target']}: no such heading"


def _anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _prose(file), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", _CASES)
def test_every_make_target_that_is_named_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    quoted = re.findall(f"`{_MAKE}", _prose(path))
    shown = [line for block in blocks_of(path) for line in re.findall(rf"^(?:\$ )?{_MAKE}", block.code, re.MULTILINE)]
    named = {word for line in quoted + shown for word in line.split()}
    assert named <= targets, f"{path.relative_to(ROOT)} names make targets that do not exist: {sorted(named - targets)}"


@pytest.mark.parametrize("path", _CASES)
def test_every_path_of_the_repository_that_is_named_exists(path: Path) -> None:
    missing = [name for name in _PATH.findall(_prose(path)) if not (ROOT / name).exists()]
    assert missing == [], f"{path.relative_to(ROOT)} names paths that are not there"
