"""Waiting for a page: the policy it is under forbids what the driver's own waiting does inside it."""

from __future__ import annotations

import time
from typing import Any


def until(page: Any, expression: str, seconds: float = 240.0) -> None:
    """Ask until the expression is true."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never true: {expression}"
        page.wait_for_timeout(50)
