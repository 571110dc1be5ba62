"""What pydantic finds wrong, in plain words: which key, what stands there, what could, and who said it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

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
_NAMED = 3  # other problems that a line has room for


def describe_error(problem: Mapping[str, Any]) -> str:
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


def build_config_error(
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
    problems = sorted(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
    problem = problems[0]
    path, kind = _find_path(problem["loc"], values)
    key = ".".join(path) or "(top level)"
    more = _describe_others(problems, values, key)
    secret = bool(_SECRET.search(path[-1])) if path else False
    override_text = next(
        (override_text for override_text in reversed(overrides) if _is_about(override_text, path)), None
    )
    if override_text is not None:
        where = f"--set {override_text.partition('=')[0]}=***" if secret else f"--set {override_text}"
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
                hint=format_suggestion(suggest_keys(model, path, values)) or f"remove {key}",
            )  # fmt: skip
        case "extra_forbidden":
            hint = format_suggestion(suggest_keys(model, path, values)) or "remove it or check the spelling"
            if secret:
                hint = "a key never stands in a config: api_key_env names the environment variable that holds it"
            return ConfigError(f"unknown config key {key!r}{more}", where=where, hint=hint)
        case "missing":
            return ConfigError(f"config key {key!r} is missing{more}", where=where)
        case _:
            whole = problem["type"] == "value_error" and not path  # keys that do not go together: it says which
            return ConfigError(
                f"{describe_error(problem) if whole else f'config key {key!r}'}{more}", where=where,
                got=None if whole or secret else _show_value(problem.get("input")),
                expected=None if whole else describe_error(problem),
            )  # fmt: skip


def _describe_others(problems: Sequence[Mapping[str, Any]], values: Mapping[str, Any], key: str) -> str:
    """What else is wrong, by key where that is short."""
    state = {"missing": " is missing", "extra_forbidden": " is unknown"}
    others: dict[str, str] = {}  # one key that could have been several things is one problem
    for entry in problems[1:]:
        other = ".".join(_find_path(entry["loc"], values)[0])
        if other != key:
            others.setdefault(other, f"{other!r}{state.get(str(entry['type']), '')}")
    if not others:
        return ""
    return f" (and {len(others)} more{': ' + ', '.join(others.values()) if len(others) <= _NAMED else ''})"


def _find_path(loc: Sequence[int | str], values: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """The key as its file has it: pydantic puts the kind of a table between the table and its key."""
    path: list[str] = []
    here: Any = values
    kind = None
    for part in loc:
        if isinstance(here, Mapping) and part not in here and find_kind_tag(here.get("kind", DEFAULT_KIND)) == part:
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


def _is_about(override: str, path: Sequence[str]) -> bool:
    override_text = override.partition("=")[0].strip().split(".")
    return override_text == list(path[: len(override_text)]) or list(path) == override_text[: len(path)] != []


def _show_value(value: object) -> str:
    if isinstance(value, dict):
        return f"a table with {', '.join(sorted(map(str, value))) or 'nothing in it'}"
    return re.sub(r"//[^/]*@", "//***@", repr(value))


# What other trainers call a key, by what it is called here: no spelling leads from the one to the other.
_CALLED = {
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


_ALIKE, _NEAR = 0.8, 0.6  # of two spellings; a key of the right name in another table stands between them


_SHOWN = 3


def suggest_keys(model: type[BaseModel], path: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Dotted keys that the unknown ``path`` may stand for, those of its own table first; empty where none is near.

    Args:
        model: Of the whole config.
        path: The unknown key, part by part.
        values: The config as it was given: kinds decide which keys a table has.
    """
    *table, name = path
    here = _opened(model, table, values)
    override_text = _at(values, path)
    everywhere = dict(_keys(model, values))
    if isinstance(override_text, Mapping):  # a table stands for a table
        own = [key for key, field in _fields(here).items() if _is_table(field.annotation)]
        everywhere = {key: tables for key, tables in everywhere.items() if tables}
    else:
        own = list(_fields(here))
    called = _CALLED.get(name, name)
    elsewhere = [key for key in everywhere if key.rpartition(".")[2] == called]
    alike = difflib.get_close_matches(name, own, n=1, cutoff=_ALIKE)
    near = difflib.get_close_matches(name, own, n=1, cutoff=_NEAR)
    if called in own or alike:
        return [".".join([*table, called if called in own else alike[0]])]
    if elsewhere:
        return elsewhere[:_SHOWN]
    if (dotted := ".".join([*table, name.replace("_", ".", 1)])) in everywhere:  # checkpoint_every
        return [dotted]
    if near:
        return [".".join([*table, near[0]])]
    last = {key.rpartition(".")[2] for key in everywhere}
    far = difflib.get_close_matches(name, sorted(last), n=1, cutoff=_ALIKE)
    return [key for key in everywhere if far and key.rpartition(".")[2] == far[0]][:_SHOWN]


def format_suggestion(keys: Sequence[str]) -> str:
    """The question to ask; empty without keys."""
    return f"did you mean {' or '.join(map(repr, keys))}?" if keys else ""


def _opened(model: type[BaseModel], path: Sequence[str], values: Mapping[str, Any]) -> type[BaseModel] | None:
    """The model of the table at ``path``, of the kind that it is given there."""
    here: type[BaseModel] | None = model
    place: Any = values
    inside: list[type[BaseModel]] = []  # of a table of tables, or a list of them: the next part is a name or a number
    default: Any = None
    for part in path:
        place = _at(place, [part])
        if here is None:
            here, inside = _of_kind(inside, place, default), []
            continue
        field = here.model_fields.get(part)
        if field is None:
            return None
        default = getattr(field.default, "kind", None)
        models = _models(field.annotation)
        if _holds_several(field.annotation):
            here, inside = None, models
        else:
            here = _of_kind(models, place, default)
            if here is None:
                return None
    return here


def _keys(model: type[BaseModel], values: Any, before: str = "") -> Iterator[tuple[str, bool]]:
    """Every dotted key, and whether it is a table; tables with names of the user's own are not gone into."""
    for name, field in model.model_fields.items():
        models = _models(field.annotation)
        yield f"{before}{name}", _is_table(field.annotation)
        if models and not _holds_several(field.annotation):
            place = _at(values, [name])
            inner = _of_kind(models, place, getattr(field.default, "kind", None))
            if inner is not None:
                yield from _keys(inner, place, f"{before}{name}.")


def _of_kind(models: Sequence[type[BaseModel]], place: Any, default: Any) -> type[BaseModel] | None:
    if len(models) < 2:
        return models[0] if models else None
    kind = find_kind_tag(place.get("kind", default) if isinstance(place, Mapping) else default)
    return next(
        (entry for entry in models if "kind" in entry.model_fields and entry.model_fields["kind"].default == kind), None
    )


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _is_table(annotation: Any) -> bool:
    return bool(_models(annotation)) or dict in {annotation, getattr(annotation, "__origin__", None)}


def _holds_several(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) in {dict, list, tuple} or any(
        _holds_several(inner) for inner in get_args(annotation)
    )


def _fields(model: type[BaseModel] | None) -> Mapping[str, Any]:
    return {} if model is None else model.model_fields


def _at(values: Any, path: Sequence[str]) -> Any:
    for part in path:
        if isinstance(values, Mapping):
            values = values.get(part)
        elif (
            isinstance(values, Sequence) and not isinstance(values, str) and part.isdigit() and int(part) < len(values)
        ):
            values = values[int(part)]
        else:
            return None
    return values
