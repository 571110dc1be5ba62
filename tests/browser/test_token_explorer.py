"""A rollout read token by token: by pointer, by touch and by keyboard, with both sides' lists beside one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.made import write_run
from topkd.report.load.collection import gather
from topkd.report.page.content import build_content
from topkd.report.page.html import render_page
from topkd.report.page.palette import make_ramp

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    path = folder / "page.html"
    path.write_text(render_page(build_content(gather([write_run(folder / "first", rollouts=3)]))), encoding="utf-8")
    return path


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_tokens_are_coloured_from_below_to_above_zero(path, open_page, theme):
    page = open_page(path, theme=theme).page
    tokens = page.locator("#tokens .token")
    assert tokens.count() == 14
    colour = "node => getComputedStyle(node).backgroundColor"
    assert tokens.nth(0).evaluate(colour) == rgb(make_ramp(theme, "below")[4])
    assert tokens.nth(6).evaluate(colour) == rgb(make_ramp(theme, "above")[0])
    assert tokens.nth(13).evaluate(colour) == rgb(make_ramp(theme, "above")[4])
    page.locator("#explorer").get_by_role("button", name="divergence", exact=True).click()
    assert tokens.nth(0).evaluate(colour) == rgb(make_ramp(theme, "much")[0])
    assert tokens.nth(13).evaluate(colour) == rgb(make_ramp(theme, "much")[4])
    assert "divergence 0.65" in tokens.nth(13).get_attribute("aria-label")


def test_hovering_a_token_shows_both_sides(path, open_page):
    page = open_page(path).page
    page.locator("#tokens .token").nth(4).hover()
    card = page.locator("#token")
    assert "cat id 10, 5 of 14" in card.inner_text().replace("\n", " ")
    teacher, student = card.locator("table.list").all()
    assert teacher.locator("tbody tr").count() == 5  # four entries, and what is left
    assert teacher.locator("tr").nth(1).inner_text().split() == ["1", "●", "t0", "30", "%"]
    assert student.locator("tr").nth(2).inner_text().split() == ["2", "●", "t2", "18", "%"]
    assert teacher.locator("tr.drawn").count() == 1
    assert "−0.2" in card.inner_text()
    assert "30 %" in card.inner_text()  # exp(-1.2)


def test_the_keyboard_moves_from_token_to_token_and_has_one_stop(path, open_page):
    page = open_page(path).page
    assert page.locator("#tokens [tabindex='0']").count() == 1
    page.locator("#tokens .token").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.i") == "3"
    assert "does not train" in page.locator("#token").inner_text()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.i") == "13"
    page.keyboard.press("ArrowUp")
    assert int(page.evaluate("document.activeElement.dataset.i")) < 13
    page.keyboard.press("Home")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.locator("#tokens [tabindex='0']").count() == 1


def test_rollouts_are_chosen_from_the_menu_and_by_the_arrows(path, open_page):
    page = open_page(path).page
    assert page.locator("#rollout").evaluate("menu => menu.selectedIndex") == 2  # the latest
    page.get_by_role("button", name="Earlier rollout").click()
    assert page.locator("#rollout").evaluate("menu => menu.selectedIndex") == 1
    page.locator("#rollout").select_option(index=0)
    assert "3 more tokens were not recorded" in page.locator("#rollout-note").text_content()
    assert "Dashed tokens do not train" in page.locator("#rollout-note").text_content()


def test_a_tap_on_a_phone_shows_the_lists_without_leaving_the_text(path, browser):
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("html[data-ready]")
    token = page.locator("#tokens .token").nth(9)
    token.scroll_into_view_if_needed()
    before = token.bounding_box()["y"]
    token.tap()
    assert "10 of 14" in page.locator("#token").inner_text()
    assert abs(token.bounding_box()["y"] - before) < 2
    # Both lists beside one another, and each has room for a token's name beside its probability.
    for name in page.locator("#token td.piece").all():
        assert name.bounding_box()["width"] > 60
    state, theme = page.locator("#state").bounding_box(), page.locator("#theme").bounding_box()
    assert state["height"] < 40 > theme["height"]  # one line each
    context.close()


def test_a_run_without_rollouts_says_so(tmp_path, open_page):
    page_path = tmp_path / "page.html"
    page_path.write_text(
        render_page(build_content(gather([write_run(tmp_path / "run", rollouts=0)]))), encoding="utf-8"
    )
    page = open_page(page_path).page
    assert page.locator("#explorer").is_hidden()
    assert "No rollouts were recorded" in page.locator("#explorer-absent").inner_text()
