"""A live page in a real browser: new points appear by themselves, and a server that is gone is said to be."""

from __future__ import annotations

import json

import pytest

from tests.browser.waiting import until
from tests.report.made import evaluation, write_run
from topkd.report.page.live_server import LivePage

pytestmark = [pytest.mark.slow, pytest.mark.browser]
DOTS = "document.querySelectorAll('#panel-reverse_kl path.dot:not(.big)').length"


def test_new_points_and_a_new_verdict_appear_without_reloading(tmp_path, open_page):
    path = write_run(tmp_path / "run", done=20)
    with LivePage([path]) as served:
        page = open_page(served.url).page
        before = page.evaluate(DOTS)
        assert "running, step 20 of 60" in page.locator("#state").text_content()
        page.evaluate("window.same = true")
        page.get_by_role("button", name="steps", exact=True).click()
        page.locator("#rollout").select_option(index=0)
        with (path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(evaluation(30, "topk_pg", 0, 60)) + "\n")
        until(page, f"{DOTS} === {before + 1}")
        assert page.evaluate("window.same") is True
        assert "1.75" in page.locator(".headline").text_content()
        # What the reader chose stays chosen.
        assert page.locator("button[value=step]").get_attribute("aria-pressed") == "true"
        assert page.locator("#rollout").evaluate("menu => menu.selectedIndex") == 0


def test_a_page_opened_before_the_run_fills_itself(tmp_path, open_page):
    (tmp_path / "run").mkdir()
    with LivePage([tmp_path / "run"]) as served:
        page = open_page(served.url).page
        assert "Waiting for the first step" in page.locator(".headline").text_content()
        write_run(tmp_path / "run", done=20)
        until(page, f"{DOTS} >= 3")
        until(page, "document.querySelectorAll('#tokens .token').length === 14")
        assert page.locator("button[value=tokens]").get_attribute("aria-pressed") == "true"


def test_a_server_that_is_gone_is_said_so_and_the_curves_stay(tmp_path, open_page):
    with LivePage([write_run(tmp_path / "run", done=20)]) as served:
        page = open_page(served.url, expected=("Failed to load resource",)).page
    until(page, "document.querySelector('#state').textContent.includes('gone')")
    page.get_by_role("button", name="Earlier rollout").click()
    until(page, "document.querySelector('#rollout-note').textContent.includes('cannot be loaded')")
    assert page.evaluate(DOTS) >= 3
