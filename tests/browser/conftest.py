"""A real Chromium, headless, in which nothing may go wrong unseen.

``make test-browser`` installs what is needed. Without Chromium these tests are skipped on a developer's machine, and
fail in CI.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")


def _missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{what}: run scripts/setup_browser.sh")
    pytest.skip(f"{what}: run scripts/setup_browser.sh")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One browser for a worker; every page has a context of its own, so an empty profile."""
    path = os.environ.get("TOPKD_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        _missing("no Chromium here")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and what it did that it should not."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Opens an address; the test fails at its end if the page complained or asked for anything but itself."""
    contexts: list[Any] = []
    opened: list[tuple[Opened, str, tuple[str, ...]]] = []

    def open_(
        address: str | Path, *, width: int = 1280, theme: str = "light", expected: tuple[str, ...] = ()
    ) -> Opened:
        url = address.resolve().as_uri() if isinstance(address, Path) else address
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion="reduce", accept_downloads=True
        )
        context.set_default_timeout(240_000)
        contexts.append(context)
        one = Opened(context.new_page())
        one.page.on("console", lambda message: one.complaints.append(f"{message.type}: {message.text}"))
        one.page.on("pageerror", lambda error: one.complaints.append(f"error: {error}"))
        one.page.on("request", lambda request: one.requests.append(request.url))
        one.page.goto(url)
        one.page.wait_for_selector("html[data-ready]")
        opened.append((one, url, expected))
        return one

    yield open_
    for context in contexts:
        context.close()
    for one, url, expected in opened:
        assert [text for text in one.complaints if not any(part in text for part in expected)] == []
        allowed = url if url.startswith("http") else None
        outside = [
            request
            for request in one.requests
            if request != url
            and not request.startswith(("data:", "blob:"))
            and not (allowed and request.startswith(allowed))
        ]
        assert outside == [], "the page asked for something but itself"
