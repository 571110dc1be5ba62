"""The documentation site as a reader opens it: from a folder, in a real browser, on a phone and on a desk."""

import re
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.browser]
PAGES = ("index.html", "how-to/troubleshooting.html", "reference/maths.html", "migrate/trl.html", "run-log.html")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.fixture
def visit(browser, site):
    complaints, contexts = [], []

    def open_(name, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(f"{name}: {message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"{name}: {error}"))
        page.on("requestfailed", lambda request: complaints.append(f"{name}: not there: {request.url}"))
        page.on("request", lambda request: complaints.extend([request.url] * request.url.startswith("http")))
        page.goto((site / name).as_uri())
        page.wait_for_load_state("load")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_the_screen_and_the_theme_is_the_systems(visit, width, theme):
    for name in PAGES:
        page = visit(name, viewport={"width": width, "height": 900}, color_scheme=theme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        red = int(re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
        assert (red > 200) == (theme == "light"), name


def test_the_search_finds_a_word_without_a_server(visit):
    page = visit("how-to/scale-out.html", viewport={"width": 1280, "height": 900})
    page.fill("input.md-search__input", "staleness")
    page.wait_for_selector(".md-search-result__item")
    assert "staleness" in page.inner_text(".md-search-result__list").lower()
