"""The keys that an unknown one may have been meant as: all that a config has, by their full dotted names."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

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


def near_keys(model: type[BaseModel], path: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Dotted keys that the unknown ``path`` may stand for, those of its own table first; empty where none is near.

    Args:
        model: Of the whole config.
        path: The unknown key, part by part.
        values: The config as it was given: kinds decide which keys a table has.
    """
    *table, name = path
    here = _opened(model, table, values)
    given = _at(values, path)
    everywhere = dict(_keys(model, values))
    if isinstance(given, Mapping):  # a table stands for a table
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


def in_a_hint(keys: Sequence[str]) -> str:
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
    kind = place.get("kind", default) if isinstance(place, Mapping) else default
    return next(
        (one for one in models if "kind" in one.model_fields and one.model_fields["kind"].default == kind), None
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
