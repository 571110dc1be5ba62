"""What pydantic finds wrong, in plain words: which key, what stands there, what could, and who said it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from topkd.compose.near_keys import in_a_hint, near_keys
from topkd.engine.config import DEFAULT_KIND
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
_NAMED = 3  # other problems that a line has room for


def in_words(problem: Mapping[str, Any]) -> str:
    """What was expected, from one of pydantic's errors."""
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


def config_error(
    error: ValidationError,
    model: type[BaseModel],
    values: Mapping[str, Any],
    *,
    where: str,
    overrides: Sequence[str] = (),
) -> ConfigError:
    """The first problem as one line; one that ``--set`` brought in is blamed on it, not on the file.

    Unknown keys come first: what is missing is often there under a name that was not meant.
    """
    problems = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    problem = problems[0]
    path, kind = _path(problem["loc"], values)
    key = ".".join(path) or "(top level)"
    more = _more(problems, values, key)
    secret = bool(_SECRET.search(path[-1])) if path else False
    given = next((given for given in reversed(overrides) if _about(given, path)), None)
    if given is not None:
        where = f"--set {given.partition('=')[0]}=***" if secret else f"--set {given}"
    context = problem.get("ctx", {})
    match problem["type"]:
        case "union_tag_invalid":
            return ConfigError(
                f"config key {key + '.kind'!r}{more}", where=where, got=repr(context.get("tag")),
                expected=f"one of {context.get('expected_tags')}",
            )  # fmt: skip
        case "union_tag_not_found":
            return ConfigError(
                f"config key {key + '.kind'!r} is missing{more}", where=where, hint="say which kind it is"
            )
        case "extra_forbidden" if kind is not None:
            return ConfigError(
                f"{'.'.join(path[:-1])} kind {kind!r} has no key {path[-1]!r}{more}", where=where,
                hint=in_a_hint(near_keys(model, path, values)) or f"remove {key}",
            )  # fmt: skip
        case "extra_forbidden":
            hint = in_a_hint(near_keys(model, path, values)) or "remove it or check the spelling"
            if secret:
                hint = "a key never stands in a config: api_key_env names the environment variable that holds it"
            return ConfigError(f"unknown config key {key!r}{more}", where=where, hint=hint)
        case "missing":
            return ConfigError(f"config key {key!r} is missing{more}", where=where)
        case _:
            whole = problem["type"] == "value_error" and not path  # keys that do not go together: it says which
            return ConfigError(
                f"{in_words(problem) if whole else f'config key {key!r}'}{more}", where=where,
                got=None if whole or secret else _shown(problem.get("input")),
                expected=None if whole else in_words(problem),
            )  # fmt: skip


def _more(problems: Sequence[Mapping[str, Any]], values: Mapping[str, Any], key: str) -> str:
    """What else is wrong, by key where that is short."""
    state = {"missing": " is missing", "extra_forbidden": " is unknown"}
    others: dict[str, str] = {}  # one key that could have been several things is one problem
    for one in problems[1:]:
        other = ".".join(_path(one["loc"], values)[0])
        if other != key:
            others.setdefault(other, f"{other!r}{state.get(str(one['type']), '')}")
    if not others:
        return ""
    return f" (and {len(others)} more{': ' + ', '.join(others.values()) if len(others) <= _NAMED else ''})"


def _path(loc: Sequence[int | str], values: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """The key as its file has it: pydantic puts the kind of a table between the table and its key."""
    path: list[str] = []
    here: Any = values
    kind = None
    for part in loc:
        if isinstance(here, Mapping) and part not in here and here.get("kind", DEFAULT_KIND) == part:
            kind = str(part)
            continue
        if isinstance(here, str | int | float) or (isinstance(here, list) and isinstance(part, str)):
            continue  # which of several types a value was taken for
        path.append(str(part))
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            here = None
    return path, kind


def _about(override: str, path: Sequence[str]) -> bool:
    given = override.partition("=")[0].strip().split(".")
    return given == list(path[: len(given)]) or list(path) == given[: len(path)] != []


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return f"a table with {', '.join(sorted(map(str, value))) or 'nothing in it'}"
    return re.sub(r"//[^/]*@", "//***@", repr(value))
