"""Overrides of a run file's settings: ``--set key=value``, and tables whose ``kind`` changes."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from topkd.engine.config.objectives import find_kind_tag
from topkd.topk.errors import ConfigError


def apply_overrides(values: dict[str, Any], overrides: Sequence[str], model: type[BaseModel]) -> list[str]:
    """Apply every ``table.key=value`` to plain values; return a note for each new kind that drops keys.

    Kinds are applied first: ``objective.beta=0.3 objective.kind=gjs`` is the same as the reverse.
    """
    notes: list[str] = []
    for override in sorted(overrides, key=lambda entry: not _split_key(entry).endswith(".kind")):
        table, _, name = _split_key(override).rpartition(".")
        if name == "kind" and isinstance(values.get(table), Mapping):
            kind = parse_value(override.partition("=")[2].strip())
            kept, dropped = switch_kind(values[table], table, kind, model)
            if dropped:
                stays = ", ".join(f"{key} = {value!r}" for key, value in kept.items() if key != "kind")
                notes.append(
                    f"--set {override}: dropped {' and '.join(dropped)} of [{table}], which {kind} does not share"
                    + (f"; kept {stays}" if stays else "")
                )
            values[table] = kept
        apply_override(values, override)
    return notes


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply one ``table.key=value`` to plain values."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError("--set takes key=value", got=override, hint="for instance --set objective.kind=gjs")
    put_value(values, key.strip(), parse_value(text.strip()), source=f"--set {override}")


def put_value(values: dict[str, Any], key: str, value: Any, *, source: str) -> None:
    """Set a dotted key of plain values; ``source`` is how the user wrote it, for errors."""
    *path, last = key.split(".")
    table = values
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{part} is a value, not a table", where=source)
    table[last] = value


def merge_settings(
    base: Mapping[str, Any], change: Mapping[str, Any], model: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Merge ``change`` into ``base``, table by table; where the kind changes, keep only keys that both kinds share."""
    made = dict(base)
    for key, value in change.items():
        old = made.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            if model is not None and "kind" in value:
                old, _ = switch_kind(old, key, value["kind"], model)
            made[key] = merge_settings(old, value)
        else:
            made[key] = value
    return made


def switch_kind(
    table: Mapping[str, Any], name: str, kind: Any, model: type[BaseModel]
) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of a table that stay when its kind changes, and the names of those that are dropped.

    A key stays if both kinds define it in the same way, default included: TAID's alpha is not EOPD's. If the table or
    the kind is unknown, or the kind does not change, all keys stay; the validation checks them later.
    """
    kinds, default = list_kinds(model, name)
    old, new = (kinds.get(find_kind_tag(kind)) for kind in (table.get("kind", default), kind))
    if old is None or new is None or old is new:
        return dict(table), []
    known, other = old.model_fields, new.model_fields
    dropped = [
        key
        for key in table
        if key != "kind" and key in known and (key not in other or repr(known[key]) != repr(other[key]))
    ]
    return {key: value for key, value in table.items() if key not in dropped}, dropped


def list_kinds(model: type[BaseModel], name: str) -> tuple[dict[str, type[BaseModel]], str]:
    """Return the models of a table by kind, and its default kind; nothing if the table has no kinds."""
    field = model.model_fields.get(name)
    if field is None or field.discriminator != "kind":
        return {}, ""
    kinds = {str(member.model_fields["kind"].default): member for member in get_args(field.annotation)}
    return kinds, str(getattr(field.default, "kind", ""))


def _split_key(override: str) -> str:
    return override.partition("=")[0].strip()


def parse_value(text: str) -> Any:
    """Parse a value as TOML, or else take it as text: --set objective.kind=gjs needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # not TOML, or a number or a nesting too long for Python
        return text
