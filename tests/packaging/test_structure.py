"""The package stays easy to find one's way in: the figures of ``scripts/structure.py`` are pinned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.structure import inspect

ROOT = Path(__file__).resolve().parents[2]

# Functions that may have more than 60 lines, each with its reason.
LONG = {
    "topkd/clients/decoding/vllm_numba.py _pass": "numba compiles one loop without calls into the fastest code",
}
MOST_LINES_OF_CODE = 43_700


@pytest.fixture(scope="module")
def found():
    return inspect(ROOT)


def test_no_folder_has_more_than_fifteen_files(found):
    assert found.crowded == []


def test_no_function_has_more_than_eight_parameters(found):
    assert found.parameters == []


def test_functions_of_more_than_sixty_lines_are_the_listed_ones(found):
    long = {re.sub(r":\d+ (\S+): \d+ lines", r" \1", place) for place in found.long}
    assert long - set(LONG) == set(), "split it, or give its reason in LONG"
    assert set(LONG) - long == set(), "no longer that long: remove it from LONG"


def test_a_public_name_has_one_meaning(found):
    assert found.twice == [], "two files define this public name: rename one"


def test_names_say_what_they_hold(found):
    assert found.vague == []


def test_the_package_does_not_grow_unnoticed(found):
    assert found.lines <= MOST_LINES_OF_CODE, "more lines than before: delete some, or raise the limit and say why"


def test_every_rule_finds_what_breaks_it(tmp_path):
    folder = tmp_path / "topkd"
    folder.mkdir()
    for number in range(16):
        (folder / f"module_{number}.py").write_text("class Meaning: ...\n")
    body = "\n".join(f"    said = {number}" for number in range(60))
    parameters = ", ".join(f"argument_{number}" for number in range(9))
    (folder / "module_0.py").write_text(f"class Meaning:\n    ...\n\n\ndef work({parameters}):\n{body}\n")
    found = inspect(tmp_path)
    assert found.crowded == ["topkd: 16 files"]
    assert found.parameters == ["topkd/module_0.py:5 work: 9 parameters"]
    assert found.long == ["topkd/module_0.py:5 work: 61 lines"]
    assert [line.partition(":")[0] for line in found.twice] == ["Meaning"]
    assert found.vague[0] == "topkd/module_0.py:6 said"
    assert found.lines == 65 + 15
