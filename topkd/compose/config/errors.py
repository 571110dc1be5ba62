"""Turns pydantic's errors into plain words: the key, its value, what was expected, and the file or --set it is in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from topkd.engine.config.engine_config import DEFAULT_KIND
from topkd.engine.config.objectives import find_kind_tag
from topkd.topk.errors import ConfigError

_WORDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "list_type": "a list",
    "tuple_type": "a list",
    "path_type": "a path",
    "none_required": "nothing",
}
_SECRET = re.compile(r"^(?!max_)(?:.*_)?(?:key|secret|password|token)(?:_env)?$")  # keys whose values are not shown
_NAMED = 3  # largest number of other problems, or suggested keys, that one line names


def describe_error(problem: Mapping[str, Any]) -> str:
    """Describe what was expected, from one of pydantic's errors."""
    if (kind := str(problem["type"])) in _WORDS:
        return _WORDS[kind]
    bounds = problem.get("ctx", {})
    if kind == "too_short":
        return f"at least {bounds['min_length']} of them"
    if kind == "string_too_short":
        return "text that is not empty"
    if kind == "string_pattern_mismatch":
        return f"text of the form {bounds['pattern']}"
    message = str(problem["msg"])
    for prefix in ("Value error, ", "Input should be ", "Assertion failed, "):
        message = message.removeprefix(prefix)
    return message[:1].lower() + message[1:] if message[:2].istitle() else message


def build_config_error(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any], *, where: str, overrides: Sequence[str]
) -> ConfigError:
    """Describe the first problem in one line, with the ``--set`` that caused it, or else the file.

    Unknown keys come first: a key that is missing is often there under a misspelt name.
    """
    problems = sorted(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
    problem = problems[0]
    path, kind = _find_path(problem["loc"], values)
    key = ".".join(path) or "(top level)"
    is_secret = bool(path and _SECRET.search(path[-1]))
    if override := next((text for text in reversed(overrides) if _is_about(text, path)), ""):
        where = f"--set {override.partition('=')[0]}=***" if is_secret else f"--set {override}"
    what, context = f"config key {key!r}", problem.get("ctx", {})
    got, expected, hint = None, None, ""
    match problem["type"]:
        case "union_tag_invalid":
            what, got = f"config key {key + '.kind'!r}", repr(context.get("tag"))
            expected = f"one of {context.get('expected_tags')}"
        case "union_tag_not_found":
            what, hint = f"config key {key + '.kind'!r} is missing", "add it"
        case "extra_forbidden":
            what = f"unknown config key {key!r}"
            hint = suggest_keys(model, path, values, is_table=isinstance(problem["input"], Mapping))
            if kind is not None:
                what = f"{'.'.join(path[:-1])} kind {kind!r} has no key {path[-1]!r}"
                hint = hint or f"remove {key}"
            elif is_secret:
                hint = "put the key into an environment variable, and the variable's name into api_key_env"
            hint = hint or "remove it or check the spelling"
        case "missing":
            what = f"config key {key!r} is missing"
        case "value_error" if not path:  # keys that exclude each other: the message names them
            what = describe_error(problem)
        case _:
            got, expected = None if is_secret else _show_value(problem.get("input")), describe_error(problem)
    return ConfigError(
        what + _describe_others(problems, values, key), where=where, got=got, expected=expected, hint=hint
    )


def _describe_others(problems: Sequence[Mapping[str, Any]], values: Mapping[str, Any], key: str) -> str:
    """Describe the other problems; name their keys if they are few."""
    state = {"missing": " is missing", "extra_forbidden": " is unknown"}
    others: dict[str, str] = {}  # several errors of one key (a union) are one problem
    for entry in problems[1:]:
        other = ".".join(_find_path(entry["loc"], values)[0])
        if other != key:
            others.setdefault(other, f"{other!r}{state.get(str(entry['type']), '')}")
    if not others:
        return ""
    return f" (and {len(others)} more{': ' + ', '.join(others.values()) if len(others) <= _NAMED else ''})"


def _find_path(loc: Sequence[int | str], values: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """Find the path of a key in its file: pydantic inserts the kind of a table between the table and its key."""
    path: list[str] = []
    here: Any = values
    kind = None
    for part in loc:
        if isinstance(here, Mapping) and part not in here and find_kind_tag(here.get("kind", DEFAULT_KIND)) == part:
            kind = str(part)
            continue
        if isinstance(here, str | int | float) or (isinstance(here, list) and isinstance(part, str)):
            continue  # pydantic names the type of a union that it tried
        path.append(str(part))
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            here = None
    return path, kind


def _is_about(override: str, path: Sequence[str]) -> bool:
    key = override.partition("=")[0].strip().split(".")
    return key == list(path[: len(key)]) or list(path) == key[: len(path)] != []


def _show_value(value: object) -> str:
    if isinstance(value, dict):
        return f"a table with {', '.join(sorted(map(str, value))) or 'nothing in it'}"
    return re.sub(r"//[^/]*@", "//***@", repr(value))


# Keys of other trainers, and their names here: the spellings are too different for a match.
_SYNONYMS = {
    "learning_rate": "lr",
    "max_new_tokens": "max_completion_tokens",
    "max_tokens": "max_completion_tokens",
    "max_steps": "steps",
    "num_generations": "samples_per_prompt",
    "group_size": "samples_per_prompt",
    "top_k": "k",
    "base_url": "url",
    "rank": "r",
}
_ALIKE, _NEAR = 0.8, 0.6  # similarity of two spellings; the same name in another table ranks between the two


def suggest_keys(model: type[BaseModel], path: Sequence[str], values: Mapping[str, Any], *, is_table: bool) -> str:
    """Suggest the keys that are most like an unknown one, those of its table first; "" if there are none.

    Args:
        model: Model of the whole config.
        path: The unknown key, part by part.
        values: The values of the config; the kind of a table decides which keys it has.
        is_table: Whether the unknown key is a table; then only tables are suggested.
    """
    table, name = ".".join(path[:-1]), path[-1]
    keys = [key for key, holds_keys in _iter_keys(model, values) if holds_keys or not is_table]
    own = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == table}
    by_name: dict[str, list[str]] = {}
    for key in keys:
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    meant = _SYNONYMS.get(name, name)
    dotted = f"{table}.{name.replace('_', '.', 1)}".lstrip(".")  # checkpoint_every
    if alike := [meant] * (meant in own) or difflib.get_close_matches(name, own, 1, _ALIKE):
        found = [own[alike[0]]]
    elif meant in by_name:
        found = by_name[meant]
    elif dotted in keys:
        found = [dotted]
    elif near := difflib.get_close_matches(name, own, 1, _NEAR):
        found = [own[near[0]]]
    else:
        found = [key for far in difflib.get_close_matches(name, by_name, 1, _ALIKE) for key in by_name[far]]
    return f"did you mean {' or '.join(map(repr, found[:_NAMED]))}?" if found else ""


def _iter_keys(model: type[BaseModel], values: Any, before: str = "") -> Iterator[tuple[str, bool]]:
    """Yield every dotted key that this config may have, and whether it is a table."""
    for name, field in model.model_fields.items():
        models = _list_models(field.annotation)
        yield f"{before}{name}", bool(models) or get_origin(field.annotation) is dict
        value = values.get(name) if isinstance(values, Mapping) else None
        tables = {f"{name}.": value}
        if _holds_several(field.annotation) and isinstance(
            value, Mapping | list | None
        ):  # tables in a list, or under names that the user chose
            entries = dict(enumerate(value)) if isinstance(value, list) else value if isinstance(value, Mapping) else {}
            tables = {f"{name}.{entry}.": table for entry, table in entries.items()}
        for place, table in tables.items():
            kind = (table if isinstance(table, Mapping) else {}).get("kind", getattr(field.default, "kind", None))
            for member in models:
                if len(models) == 1 or getattr(member.model_fields.get("kind"), "default", None) == find_kind_tag(kind):
                    yield from _iter_keys(member, table, f"{before}{place}")


def _list_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _list_models(inner)]


def _holds_several(annotation: Any) -> bool:
    return get_origin(annotation) in {dict, list, tuple} or any(map(_holds_several, get_args(annotation)))
