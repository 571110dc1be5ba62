"""The documentation site: builds without a warning, loads nothing from elsewhere, quotes real messages."""

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_every_page_of_the_navigation_is_built_and_refers_to_nothing_that_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    loaded = re.compile(r'<(?:script|img|iframe|source)[^>]+src="(https?:)?//|<link[^>]+rel="(?:stylesheet|preload|preconnect|icon)"[^>]+href="(https?:)?//')  # fmt: skip  # noqa: E501
    for page in pages:
        assert not loaded.search(page.read_text(encoding="utf-8")), page


@pytest.mark.slow
def test_the_reference_shows_the_public_names_with_their_docstrings(site):
    maths = (site / "reference" / "maths.html").read_text(encoding="utf-8")
    for name in ("gjs_advantage", "topk_gjs", "entropy_bounds", "value_baseline"):
        assert re.search(rf'id="topkd\.topk\.[\w.]+\.{name}"', maths), name


def find_messages():
    """Find what the code can print: string constants except docstrings, and patterns of f-strings."""
    constants, patterns = [], []
    for path in sorted((ROOT / "topkd").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".+?" for part in node.values]
                fixed = sum(len(part.value) for part in node.values if isinstance(part, ast.Constant))
                if fixed > 12:  # "step {} of {}" would match half of all sentences
                    patterns.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                constants.append(node.value)
    return constants, patterns


def test_the_messages_that_troubleshooting_explains_are_the_messages_of_the_code():
    page = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE)
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 40
    constants, patterns = find_messages()
    unknown = [
        message for message in quoted
        if not any(message in text for text in constants)
        and not any(re.match(pattern, message) for pattern in patterns)
    ]  # fmt: skip
    assert unknown == []


def test_a_message_that_only_a_docstring_or_a_name_holds_counts_as_unknown():
    constants, patterns = find_messages()
    assert not any("no silent wrong numbers" in text for text in constants)
    assert any(re.match(pattern, "step 12 lost 40 of 64 samples") for pattern in patterns)
    assert not any(re.match(pattern, "step 12 mislaid 40 of 64 samples") for pattern in patterns)


def test_the_options_that_migration_pages_name_exist():
    from topkd.compose.config.run_config import RunConfig

    def keys(model, depth=4):
        found = set(model.model_fields)
        for field in model.model_fields.values():
            stack = [field.annotation]
            while stack:
                annotation = stack.pop()
                stack += getattr(annotation, "__args__", ())
                if depth and hasattr(annotation, "model_fields"):
                    found |= keys(annotation, depth - 1)
        return found

    known = keys(RunConfig) | {"kind", "r"}
    for page in sorted((ROOT / "docs" / "migrate").glob("*.md")):
        for row in page.read_text(encoding="utf-8").splitlines():
            cells = row.split("|")
            if len(cells) < 4 or not cells[1].strip().startswith("`"):
                continue
            for code in re.findall(r"`([a-z_.]+)(?: = [^`]*)?`", cells[2]):
                unknown = [part for part in code.split(".") if part not in known]
                assert not unknown or code in RUN_LOG_OR_VALUES, f"{page.name}: {code}"


RUN_LOG_OR_VALUES = {"kl_k1", "kl_k3", "behavior_kl_k3", "packed", "raw", "cold", "teacher_id", "topkd.clients"}


def test_the_site_configuration_lists_every_page():
    listed = set(
        re.findall(r"- [^\n]+: ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    )
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} - {"tree.md"}
    assert there == listed
