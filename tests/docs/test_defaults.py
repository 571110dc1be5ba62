"""docs/defaults.md says what the configs hold."""

from __future__ import annotations

import re

import pytest

from tests.docs.blocks import ROOT
from topkd.compose.config.run_config import RunConfig, validate_config

BARE = {"student": {"model": "m"}, "teacher": {"url": "http://127.0.0.1:8000"}, "data": {"path": "p.jsonl"}}
SERVED = {"sampler": {"kind": "server", "url": "http://127.0.0.1:8001"}}
IN_VLLM = {"sampler": {"kind": "vllm"}}
TABLES = {"student": {"model": "m", "lora": {}}, "cache": {"path": "c"}, "eval": {"path": "e.jsonl"}}
# Between them they have every key of an objective, of a sampler and of the tables that a run may leave out.
VARIANTS = (
    {},
    SERVED,
    IN_VLLM,
    TABLES,
    *({"objective": {"kind": kind}} for kind in ("gjs", "fkl", "taid", "entropy_aware", "eopd")),
)


def rows():
    """(key, default) of each row that states one key and one plain value."""
    page = (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")
    for key, default in re.findall(r"^\| `([\w.]+)` \| ([^|;]+) \|", page, re.MULTILINE):
        value = plain(default.strip())
        if value is not ...:
            yield key, value


def plain(text):
    words = {"none": None, "off": False, "on": True}
    if re.fullmatch(r"-?\.?\d[\d.e-]*", text):
        return float(text)
    if re.fullmatch(r"`[\w-]+`", text):
        return text.strip("`")
    return words.get(text, ...)


def defaults(key):
    """What the key is by default: in a bare run where that has it, else in each variant that does."""
    for variant in VARIANTS:
        found = validate_config(RunConfig, BARE | variant, where="test")
        for name in key.split("."):
            if not hasattr(found, name):
                break
            found = getattr(found, name)
        else:
            yield found
            if not variant:
                return


@pytest.mark.parametrize(("key", "value"), list(rows()), ids=str)
def test_a_default_is_the_one_that_its_page_gives(key, value):
    found = list(defaults(key))
    assert found, f"no run has a {key}"
    assert all(default == value or (value is False and default in {None, "off"}) for default in found), (
        f"{key} is {found}"
    )


def test_most_rows_are_compared():
    assert len(list(rows())) > 80


def keys(model, prefix=""):
    """Every key of a config and of its tables, as ``--set`` takes it."""
    for name, field in model.model_fields.items():
        key, found = prefix + name, list(tables_of(field.annotation))
        if key != "teachers":  # its tables have the keys of [teacher]
            yield from (inner for table in found for inner in keys(table, f"{key}.")) if found else [key]


def tables_of(annotation):
    if hasattr(annotation, "model_fields"):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from tables_of(inner)


def test_the_page_has_every_key():
    page = (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")
    missing = {key for key in keys(RunConfig) if f"`{key}`" not in page}
    assert missing == {"objective.function"}  # `kind` names the function
