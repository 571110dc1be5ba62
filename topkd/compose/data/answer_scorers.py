"""Scorers that grade answers: exact match, numeric match, or a user's function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from topkd.compose.config.functions import load_function
from topkd.topk.errors import ConfigError, DataError

Row: TypeAlias = Mapping[str, Any]
AnswerScorer: TypeAlias = Callable[[Row, str], float]

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


def exact_match(row: Row, completion: str) -> float:
    """Return 1 if the completion equals the row's ``answer``; white space at both ends is ignored."""
    return float(completion.strip() == _read_answer(row).strip())


def score_numeric_match(row: Row, completion: str) -> float:
    """Return 1 if the completion's last number equals the last number of the row's ``answer`` (within 1e-6 of it)."""
    wanted, found = _find_last_number(_read_answer(row)), _find_last_number(completion)
    if wanted is None:
        raise DataError("the answer holds no number", got=repr(row.get("answer")), hint='use scorer = "exact_match"')
    return float(found is not None and math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9))


_NAMED: dict[str, AnswerScorer] = {"exact_match": exact_match, "numeric_match": score_numeric_match}


def load_answer_scorer(name: str) -> AnswerScorer:
    """Load the scorer that a config names; an exception in a user's function becomes a ConfigError.

    Args:
        name: "exact_match", "numeric_match", ``module:function`` or ``file.py:function``.
    """
    if name in _NAMED:
        return _NAMED[name]
    function = load_function(
        name, "eval.scorer", expected="exact_match, numeric_match, module:function or file.py:function"
    )

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


def _read_answer(row: Row) -> str:
    answer = row.get("answer")
    if answer is None or isinstance(answer, list | dict):
        raise DataError(
            "the scorer needs an answer in every row", where=f"row {row.get('id', '?')}", got=f"columns {sorted(row)}",
            hint="add an answer column, or name your own function in eval.scorer",
        )  # fmt: skip
    return str(answer)


def _find_last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
