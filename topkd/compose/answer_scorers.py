"""What an answer is worth: exact match, numeric match, or a function of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from topkd.topk.errors import ConfigError, DataError

Row: TypeAlias = Mapping[str, Any]
AnswerScorer: TypeAlias = Callable[[Row, str], float]

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


def exact_match(row: Row, completion: str) -> float:
    """1 when the completion is the row's ``answer``, white space at both ends aside."""
    return float(completion.strip() == _answer(row).strip())


def numeric_match(row: Row, completion: str) -> float:
    """1 when the completion's last number equals the last number of the row's ``answer`` (to 1e-6 of it)."""
    wanted, said = _last_number(_answer(row)), _last_number(completion)
    if wanted is None:
        raise DataError("the answer holds no number", got=repr(row.get("answer")), hint='use scorer = "exact_match"')
    return float(said is not None and math.isclose(said, wanted, rel_tol=1e-6, abs_tol=1e-9))


_NAMED: dict[str, AnswerScorer] = {"exact_match": exact_match, "numeric_match": numeric_match}


def answer_scorer(name: str) -> AnswerScorer:
    """The scorer a config names; whatever goes wrong inside a user's own is one clear line.

    Args:
        name: "exact_match", "numeric_match", ``module:function`` or ``file.py:function``.
    """
    if name in _NAMED:
        return _NAMED[name]
    function = imported(name, "eval.scorer", expected="exact_match, numeric_match, module:function or file.py:function")

    def score(row: Row, completion: str) -> float:
        try:
            value = function(row, completion)
            number = float(value)
        except Exception as error:
            raise ConfigError(
                "the scorer failed", where=f"{name}, row {row.get('id', '?')}", got=f"{type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(number):
            raise ConfigError("a score must be a finite number", where=f"{name}, row {row.get('id', '?')}", got=value)
        return number

    return score


def imported(name: str, key: str, *, expected: str = "module:function or file.py:function") -> Callable[..., Any]:
    """The function that ``module:function`` or ``file.py:function`` names; ``key`` is where the config says so."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ConfigError(f"{key} names no function", got=repr(name), expected=expected)
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise ConfigError(f"{key} cannot be imported", where=place, got=f"{type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"{key} names no function", where=place, got=repr(attribute))
    return function  # type: ignore[no-any-return]


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"topkd_user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _answer(row: Row) -> str:
    answer = row.get("answer")
    if answer is None or isinstance(answer, list | dict):
        raise DataError(
            "a row to be scored needs an answer", where=f"row {row.get('id', '?')}", got=f"columns {sorted(row)}",
            hint="add an answer column, or name a scorer of your own in eval.scorer",
        )  # fmt: skip
    return str(answer)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
