"""The config of a run: one TOML file, read into one frozen object. A mistake in it is an error of one line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from topkd.clients import ClientConfig
from topkd.compose.config.errors import build_config_error
from topkd.compose.config.overrides import apply_overrides
from topkd.compose.config.tables import (
    CacheConfig,
    DataConfig,
    EvalConfig,
    InProcessSampling,
    ReplayConfig,
    SamplerConfig,
    StudentConfig,
    TeacherConfig,
    TrackConfig,
)
from topkd.engine import EngineConfig
from topkd.files import write_atomically
from topkd.topk.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


class RunConfig(EngineConfig):
    """The settings of ``topkd train run.toml``: the engine's at the top level, and a table for each other part."""

    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    data: DataConfig
    client: ClientConfig = ClientConfig()
    cache: CacheConfig | None = None
    replay: ReplayConfig = ReplayConfig()
    sampler: SamplerConfig = InProcessSampling()
    eval: EvalConfig | None = None
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _one_way_to_name_teachers(self) -> RunConfig:
        alone = self.teacher is None and not self.teachers and self.objective.is_data_only  # no teacher is needed
        if (self.teacher is None) == (not self.teachers) and not alone:
            raise ValueError("a run needs either a [teacher] table or [teachers.NAME] tables, and not both")
        if self.eval is not None and self.eval_every and self.eval.every not in {0, self.eval_every}:
            raise ValueError("eval.every and eval_every are different numbers: remove one of them")
        if self.eval is None and self.eval_every:
            raise ValueError(
                "eval_every measures nothing without [eval]: add [eval] with path and every, or remove eval_every"
            )
        moving = [teacher for teacher in self.teacher_map().values() if teacher.kind == "self" and teacher.ema < 1.0]
        if moving and self.max_staleness:
            raise ValueError("a self teacher with ema < 1 needs max_staleness = 0: else its scores depend on timing")
        if moving and self.cache is not None:
            raise ValueError("a self teacher with ema < 1 cannot have a [cache]: it changes with every step")
        if self.cache is not None and self.objective.list_support != "teacher":
            raise ValueError('a [cache] holds only the teacher\'s own lists: set objective.support = "teacher"')
        return self

    def with_eval_schedule(self) -> RunConfig:
        """Return the config with the loop's ``eval_every``; ``eval.every`` replaces it, unless it is 0."""
        if self.eval is None:
            return self
        return self.model_copy(update={"eval_every": self.eval.every or self.eval_every})

    def teacher_map(self) -> dict[str, TeacherConfig]:
        """Return each teacher's config by its teacher_id; a single [teacher] has the empty id."""
        return {"": self.teacher} if self.teacher is not None else dict(self.teachers)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), on_note: Callable[[str], None] = lambda _: None
) -> RunConfig:
    """Read a TOML run file, apply ``key=value`` overrides, and check everything.

    Args:
        path: The run file. Relative paths in it are taken from the working directory.
        overrides: ``key=value``, as ``--set`` takes them.
        on_note: Called with a line for each override that drops keys of the file, because they belong to another kind.
    """
    path = Path(path)
    values = read_toml(path)
    for line in apply_overrides(values, overrides, RunConfig):
        on_note(line)
    return validate_config(RunConfig, values, where=str(path), overrides=overrides)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raise ConfigError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError("cannot read the config", where=str(path), got=reason) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("the config is not TOML", where=str(path), got=str(error)) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number with thousands of digits"
        raise ConfigError("the config cannot be read", where=str(path), got=reason) from error


def validate_config(model: type[M], values: Mapping[str, Any], *, where: str, overrides: Sequence[str] = ()) -> M:
    """Build ``model`` from plain values; raise the first problem as a ConfigError."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise build_config_error(error, model, values, where=where, overrides=overrides) from None


def save_config(config: BaseModel, path: Path) -> None:
    """Write the resolved config as JSON; it has the names of variables that hold secrets, never the secrets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
