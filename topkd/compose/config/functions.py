"""Functions that a config names: ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from topkd.engine.config.objectives import CustomObjective, ObjectiveSettings, check_loss_function
from topkd.topk.errors import ConfigError


def load_function(name: str, key: str, *, expected: str = "module:function or file.py:function") -> Callable[..., Any]:
    """Load a function by ``module:function`` or ``file.py:function``; errors name the config key ``key``."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ConfigError(f"{key} names no function", got=repr(name), expected=expected)
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise ConfigError(f"{key} cannot be imported", where=place, got=f"{type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"{key} names no function", where=place, got=repr(attribute))
    return function  # type: ignore[no-any-return]


def load_loss(objective: ObjectiveSettings) -> Callable[..., Any] | None:
    """Load and check the function of a custom objective; None for a built-in kind."""
    if not isinstance(objective, CustomObjective):
        return None
    function = load_function(objective.function, "objective.kind")
    check_loss_function(function, where=objective.function)
    return function


def find_source_file(function: Callable[..., Any]) -> Path | None:
    """Find the file in which a function is defined; None if there is no file."""
    try:
        source = inspect.getsourcefile(function)
    except TypeError:  # an instance with __call__
        source = inspect.getsourcefile(type(function))
    return None if source is None else Path(source)


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"topkd_user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
