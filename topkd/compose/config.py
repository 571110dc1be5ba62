"""One run, one frozen config, one TOML file; every mistake in it is one clear line."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from topkd.clients import ClientConfig
from topkd.compose.sampling_config import InProcessSampling, SamplerConfig
from topkd.compose.tables import CacheConfig, DataConfig, ReplayConfig, StudentConfig, TeacherConfig
from topkd.compose.watch_tables import EvalConfig, TrackConfig
from topkd.engine import EngineConfig
from topkd.topk.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


class RunConfig(EngineConfig):
    """``topkd train run.toml``: the engine's settings at the top level, and the pieces it is wired to."""

    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: Annotated[dict[str, TeacherConfig], Field(default_factory=dict)]
    data: DataConfig
    client: ClientConfig = ClientConfig()
    cache: CacheConfig | None = None
    replay: ReplayConfig = ReplayConfig()
    sampler: SamplerConfig = InProcessSampling()
    eval: EvalConfig | None = None
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _one_way_to_name_teachers(self) -> RunConfig:
        alone = self.teacher is None and not self.teachers and self.objective.kind == "sft"  # nobody is asked
        if (self.teacher is None) == (not self.teachers) and not alone:
            raise ValueError("give either [teacher] or [teachers.NAME] tables, not both and not neither")
        moving = [teacher for teacher in self.teacher_map().values() if teacher.kind == "self" and teacher.ema < 1.0]
        if moving and self.max_staleness:
            raise ValueError("max_staleness = 0 for a self teacher that moves: else its scores depend on timing")
        if moving and self.cache is not None:
            raise ValueError("no [cache] for a self teacher that moves: every step has another teacher")
        return self

    def teacher_map(self) -> dict[str, TeacherConfig]:
        """teacher_id -> config; the single [teacher] answers to the empty id."""
        return {"": self.teacher} if self.teacher is not None else dict(self.teachers)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML run file, apply ``key=value`` overrides, check everything."""
    values = read_toml(path)
    for override in overrides:
        apply_override(values, override)
    return validated(RunConfig, values, where=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; what cannot be read is one clear error."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError("cannot read the config", where=str(path), got=reason) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("the config is not TOML", where=str(path), got=str(error)) from error


def validated(model: type[M], values: Mapping[str, Any], *, where: str) -> M:
    """``model`` from plain values; the first problem pydantic finds becomes one ConfigError."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if problem["type"] == "union_tag_invalid":
            context = problem.get("ctx", {})
            raise ConfigError(
                f"config key {key + '.kind'!r}{more}",
                where=where,
                got=repr(context.get("tag")),
                expected=f"one of {context.get('expected_tags')}",
            ) from None
        if problem["type"] == "extra_forbidden" and len(problem["loc"]) > 2:
            *_, table, kind, name = (str(part) for part in problem["loc"])
            if isinstance(values.get(table), Mapping) and values[table].get("kind") == kind:
                raise ConfigError(
                    f"{table} kind {kind!r} has no key {name!r}{more}", where=where, hint=f"remove {table}.{name}"
                ) from None
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(model), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it or check the spelling"
            raise ConfigError(f"unknown config key {key!r}{more}", where=where, hint=hint) from None
        raise ConfigError(
            f"config key {key!r}{more}", where=where, got=_shown(problem.get("input")), expected=problem["msg"]
        ) from None


def _known_keys(model: type[BaseModel], depth: int = 3) -> set[str]:
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(name)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for inner in candidates:
            if depth and isinstance(inner, type) and issubclass(inner, BaseModel):
                keys |= _known_keys(inner, depth - 1)
    return keys


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return f"a table with {sorted(value)}"
    return re.sub(r"//[^/]*@", "//***@", repr(value))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Lay one ``table.key=value`` over plain values."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError("--set takes key=value", got=override, hint="for instance --set objective.kind=gjs")
    *path, last = key.strip().split(".")
    table = values
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}: {part} is a value, not a table", got=override)
    table[last] = _parsed(text.strip())


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string, so that --set objective.kind=gjs needs no quotes


def saved(config: BaseModel, path: Path) -> None:
    """Write the resolved config beside the run, as JSON; secrets are not in it (only names of variables are)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
