"""The report's page in a real browser: what is drawn, read, pressed and taken along."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.browser.waiting import until
from tests.report.made import NASTY, write_comparison, write_run
from topkd.report.load.collection import gather
from topkd.report.page.content import build_content
from topkd.report.page.html import render_page

COLLISIONS = """() => [...document.querySelectorAll('svg.lines, svg.strip')].flatMap((chart) => {
    const frame = chart.getBoundingClientRect();
    const boxes = [...chart.querySelectorAll('text')].map((text) => [text.textContent, text.getBoundingClientRect()]);
    const where = chart.closest('[id]').id;
    const leaves = ([, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
        || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
    const out = boxes.filter(leaves).map(([text]) => `${where}: ${text} leaves`);
    boxes.forEach(([a, one], i) => boxes.slice(i + 1).forEach(([b, two]) => {
        const across = Math.min(one.right, two.right) - Math.max(one.left, two.left);
        const down = Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top);
        if (across > 0.5 && down > 2.5) out.push(`${where}: ${a} on ${b}`);
    }));
    return out;
})"""

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    path = folder / "page.html"
    path.write_text(render_page(build_content(gather([write_run(folder / "first")]))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def comparison_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cmp")
    path = folder / "page.html"
    path.write_text(render_page(build_content(gather([write_comparison(folder / "cmp")]))), encoding="utf-8")
    return path


def unfold(page: Any) -> None:
    """Open what is folded away, and wait until its charts are drawn."""
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    until(page, "[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('svg, p'))")


def panel(page: Any, key: str) -> Any:
    return page.locator(f"#panel-{key}")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_every_panel_draws_inside_the_page_at_every_width(run_page, comparison_page, open_page, width, theme):
    for path in (run_page, comparison_page):
        page = open_page(path, width=width, theme=theme).page
        data = json.loads(page.locator("#data").text_content())
        keys = [one["key"] for section in data["sections"] for one in section["panels"]]
        assert len(keys) > 30
        unfold(page)
        for key in keys:
            drawn = (
                panel(page, key)
                .locator("svg.lines path")
                .evaluate_all("paths => paths.filter((path) => path.getTotalLength() > 10).length")
            )
            assert drawn >= 1, key
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(246, 247, 249)" if theme == "light" else "rgb(15, 18, 22)"
        )


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_label_of_a_chart_overlaps_another_or_leaves_it(comparison_page, run_page, open_page, width):
    for path in (comparison_page, run_page):
        page = open_page(path, width=width).page
        if width == 1280:  # the replays too: as many labels as there are
            hidden = page.locator(".legend button[aria-pressed=false]")
            while hidden.count():
                hidden.first.click()
        collisions = page.evaluate(COLLISIONS)
        assert collisions == []


def test_a_long_name_beside_a_strip_is_cut_to_the_room_it_has(tmp_path, open_page):
    folder = write_comparison(tmp_path / "cmp")
    told = json.loads((folder / "compare.json").read_text())
    told["arms"][0]["label"] = "sampled token, reverse KL, value baseline"  # by a few pixels too long on a phone
    (folder / "compare.json").write_text(json.dumps(told))
    (tmp_path / "page.html").write_text(render_page(build_content(gather([folder]))), encoding="utf-8")
    names = open_page(tmp_path / "page.html", width=360).page.locator("svg.strip text.name")
    assert any(name.endswith("…") for name in names.all_text_contents())
    beyond = "ts => ts.map((t) => t.getBoundingClientRect().right - t.ownerSVGElement.getBoundingClientRect().right)"
    assert max(names.evaluate_all(beyond)) <= 0


def test_an_axis_that_does_not_begin_at_zero_says_so_and_shows_it(run_page, open_page):
    page = open_page(run_page).page
    cuts = 0
    for chart in page.locator("svg.lines").all():
        said = "does not begin at zero" in chart.get_attribute("aria-label")
        ticks = chart.locator("text.tick.end").all_text_contents()
        assert said == (chart.locator("path.cut").count() == 1)
        assert not (said and "0" in ticks), ticks
        cuts += said
    assert cuts > 0


def test_no_mark_of_a_chart_stands_beyond_its_last_value(run_page, open_page):
    page = open_page(run_page).page
    middle = "e => { const b = e.getBBox(); return b.x + b.width / 2; }"
    for chart in page.locator("svg.lines").all():
        end = chart.locator("line.axis").first.evaluate("e => e.x2.baseVal.value")
        beyond = [dot.evaluate(middle) - end for dot in chart.locator(".dot").all()]
        assert max(beyond, default=0.0) < 0.1


def test_no_two_ticks_of_an_axis_read_the_same(tmp_path, open_page):
    runs = [write_run(tmp_path / f"run{seed}", seed=seed, done=20 + 20 * seed) for seed in range(2)]
    for path, mismatch in zip(runs, (7.80e-14, 7.85e-14), strict=True):
        run_log = (path / "metrics.jsonl").read_text().replace('"mismatch_kl": 1e-06', f'"mismatch_kl": {mismatch}')
        (path / "metrics.jsonl").write_text(run_log.replace('"lr": 0.001', '"lr": 12345.5'))
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"k": path.name}))
    (tmp_path / "page.html").write_text(render_page(build_content(gather(runs))), encoding="utf-8")
    page = open_page(tmp_path / "page.html").page
    for chart in page.locator("svg.lines").all():
        for which in ("text.end", "text.middle"):
            ticks = chart.locator(which).all_text_contents()
            assert len(set(ticks)) == len(ticks) >= 1, (chart.get_attribute("aria-label"), ticks)


def test_hovering_a_chart_reads_the_values_under_the_pointer(comparison_page, open_page):
    page = open_page(comparison_page).page
    chart = panel(page, "reverse_kl").locator("svg.lines")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.02 + 40, box["y"] + 60)
    tip = panel(page, "reverse_kl").locator(".tip")
    assert tip.inner_text().split("\n")[0] == "tokens trained on: 0"
    assert re.findall(r"top-20\s*2\b", tip.inner_text())
    # The same moment is marked in the other charts, without a table.
    other = panel(page, "forward_kl")
    assert other.locator("g.cross line.hair").count() == 1
    assert other.locator(".tip").is_hidden()
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    assert other.locator("g.cross line.hair").count() == 0


def test_the_keyboard_reads_single_values_and_says_them(run_page, open_page):
    page = open_page(run_page).page
    chart = panel(page, "reverse_kl").locator("svg.lines")
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert "tokens trained on: 0" in page.locator("#said").text_content()
    page.keyboard.press("ArrowRight")
    assert page.locator("#said").text_content() == "tokens trained on: 1,000. topk_pg 1.917"
    page.keyboard.press("End")
    assert page.locator("#said").text_content() == "tokens trained on: 6,000. topk_pg 1.5"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Escape")
    assert panel(page, "reverse_kl").locator(".tip").is_hidden()
    panel(page, "ratio_hist").locator("svg.lines").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert page.locator("#said").text_content() == "ratio 1 to 2. topk_pg 80 %"


def test_the_axis_the_scale_and_the_prefixes_can_be_switched(run_page, open_page):
    page = open_page(run_page).page
    chart = panel(page, "reverse_kl").locator("svg.lines")
    assert "against tokens trained on" in chart.get_attribute("aria-label")
    for name, expected in (
        ("seconds", "against seconds"),
        ("teacher tokens", "tokens scored by the teacher"),
        ("steps", "against steps"),
    ):
        page.get_by_role("button", name=name, exact=True).click()
        assert expected in chart.get_attribute("aria-label")
    assert chart.locator("text.middle").last.text_content() == "60"
    page.get_by_role("button", name="log KL").click()
    assert panel(page, "reverse_kl").locator(".unit").text_content() == "nats per token, log scale"
    assert panel(page, "agreement").locator(".unit").text_content() == "% of positions"
    page.get_by_role("button", name="fresh", exact=True).click()
    assert "from 2.1 to 1.6" in chart.get_attribute("aria-label")
    page.get_by_role("button", name="smooth").click()
    assert panel(page, "kl_k1").locator("path.raw").count() == 0


def test_a_setting_can_be_hidden_and_a_chart_made_larger(comparison_page, open_page):
    page = open_page(comparison_page).page
    lines = panel(page, "reverse_kl").locator("path.main")
    assert lines.count() == 2  # replays wait in the legend
    legend = page.locator(".legend button")
    assert [button.get_attribute("aria-pressed") for button in legend.all()] == ["true", "true", "false", "false"]
    legend.nth(0).click()
    assert lines.count() == 1
    legend.nth(3).click()
    assert lines.count() == 2
    before = panel(page, "reverse_kl").bounding_box()["width"]
    page.get_by_role("button", name="Larger: KL(student ‖ teacher)").click()
    until(page, "document.querySelector('#panel-reverse_kl svg').getAttribute('width') > 900")
    assert panel(page, "reverse_kl").bounding_box()["width"] > 2 * before


def test_the_seeds_and_their_paired_differences_are_drawn(comparison_page, open_page):
    page = open_page(comparison_page).page
    strips = {name: page.locator(f"[data-measure={name}] svg.strip") for name in ("area", "tokens", "last")}
    assert [strips[name].count() for name in strips] == [2, 2, 2]
    assert strips["area"].nth(0).locator(".seed-dot").count() == 6
    assert "sampled token: 0.921, 95 % interval 0.9203 to 0.9214" in strips["area"].nth(1).get_attribute("aria-label")
    assert strips["last"].nth(1).locator(".seed-dot").count() == 3
    assert "sampled token: +0.3, 95 % interval 0.3 to 0.3, 3 seeds" in strips["last"].nth(1).get_attribute("aria-label")
    # Runs that never arrived are marked where they ended, and have no part in a mean or a ratio.
    tokens = strips["tokens"].nth(0)
    assert (tokens.locator(".seed-dot").count(), tokens.locator(".late").count()) == (4, 2)
    assert tokens.locator(".late title").first.text_content() == "seed 0: not within 2,000"
    assert "sampled token: 2 of 3 never, 3 seeds" in tokens.get_attribute("aria-label")
    assert strips["tokens"].nth(1).locator(".seed-dot").count() == 1
    assert "(1 of 3 pairs)" in strips["tokens"].nth(1).get_attribute("aria-label")


def test_groups_differ_by_shape_as_well_as_by_colour(comparison_page, open_page):
    page = open_page(comparison_page).page
    shapes = page.locator(".legend .swatch path").evaluate_all("marks => marks.map((mark) => mark.getAttribute('d'))")
    assert len(set(shapes)) == len(shapes) == 4
    drawn = (
        panel(page, "kl_k1")
        .locator("svg.lines path.dot")
        .evaluate_all(
            "marks => marks.map((mark) => [mark.getAttribute('class'), mark.getAttribute('d').replace(/M[^a-z]*/, '')])"
        )
    )
    by_group = {name: {shape for one, shape in drawn if one == name} for name, _ in drawn}
    assert set(by_group) == {"dot g0", "dot g1"}
    assert not by_group["dot g0"] & by_group["dot g1"]


def test_the_table_is_copied_and_the_data_downloaded(comparison_page, open_page):
    page = open_page(comparison_page).page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy as Markdown").click()
    page.get_by_role("button", name="Copied").wait_for()
    text = page.evaluate("navigator.clipboard.readText()")
    head, rule, first = text.split("\n")[:3]
    assert head.startswith("| setting | runs | KL(S‖T) |")
    assert rule.startswith("|:--|--:|")
    assert first.startswith("| top-20 | 3 |")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download curves (CSV)").click()
    assert waiting.value.suggested_filename == "scalar-against-top-K.csv"
    rows = list(csv.DictReader(io.StringIO(Path(waiting.value.path()).read_text(encoding="utf-8"))))
    ends = [
        row for row in rows if row["panel"] == "reverse_kl" and row["role"] == "main" and row["prefixes"] == "fixed"
    ]
    assert {(row["setting"], row["step"], row["value"]) for row in ends if row["step"] == "20"} >= {
        ("top-20", "20", "1.49")
    }
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download all data (JSON)").click()
    whole = json.loads(Path(waiting.value.path()).read_text(encoding="utf-8"))
    assert whole["title"] == "scalar against top-K"
    assert whole["comparison"]["live"]["arms"][1]["seeds"]["0"]["final"] == 1.5


def test_only_settings_that_differ_are_shown_until_all_are_wanted(comparison_page, open_page):
    page = open_page(comparison_page).page
    shown = page.locator("#configs tbody tr:visible")
    few = shown.count()
    page.get_by_label("only the").uncheck()
    assert shown.count() > few
    assert page.locator("#configs mark").count() > 0


def test_the_theme_can_be_chosen_against_the_systems(run_page, open_page):
    page = open_page(run_page, theme="dark").page
    colour = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(colour) == "rgb(15, 18, 22)"
    button = page.locator("#theme")
    button.click()
    assert button.text_content() == "Theme: light"
    assert page.evaluate(colour) == "rgb(246, 247, 249)"
    button.click()
    button.click()
    assert button.text_content() == "Theme: system"
    assert page.evaluate(colour) == "rgb(15, 18, 22)"


def test_a_page_in_the_dark_is_printed_on_white(run_page, open_page):
    page = open_page(run_page, theme="dark").page
    page.locator("#theme").click()
    page.locator("#theme").click()
    assert page.locator("#theme").text_content() == "Theme: dark"
    page.emulate_media(media="print", color_scheme="dark")
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert colours == ["rgb(255, 255, 255)", "rgb(22, 25, 29)"]
    assert page.locator("#controls").is_hidden()


def test_the_page_is_walked_through_by_tab_in_the_order_it_is_read(comparison_page, open_page):
    """Header, switches, charts, rollout, tables: and every stop shows where it is."""
    page = open_page(comparison_page).page
    stops = []
    for _ in range(200):
        page.keyboard.press("Tab")
        stop = page.evaluate("""() => {
            const at = document.activeElement;
            if (at === document.body) return null;
            const section = at.closest('header, #contents, #controls, #charts, #explorer, #summary, #settings');
            return [section ? section.id || 'header' : at.className, getComputedStyle(at).outlineStyle];
        }""")
        if stop is None:
            break
        stops.append(stop)
    assert {outline for _, outline in stops} == {"solid"}
    visited = [where for i, (where, _) in enumerate(stops) if i == 0 or stops[i - 1][0] != where]
    assert visited == ["skip", "header", "contents", "controls", "charts", "explorer", "summary", "settings"]


def test_nothing_that_a_model_wrote_runs(run_page, open_page):
    page = open_page(run_page).page
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    assert NASTY.replace("\u2028", "") in page.locator("#tokens .token").first.text_content().replace("\u2028", "")


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1280, 480), (768, 1024), (360, 640)])
def test_an_enlarged_chart_fits_the_window(run_page, open_page, width, height):
    page = open_page(run_page, width=width).page
    page.set_viewport_size({"width": width, "height": height})
    for key in ("reverse_kl", "ratio_hist"):
        panel(page, key).locator("button.wide").click()
        box = panel(page, key).bounding_box()
        controls = page.locator("#controls").bounding_box() if width > 640 else {"y": 0, "height": 0}
        assert box["y"] >= controls["y"] + controls["height"]
        assert box["y"] + box["height"] <= height
        assert panel(page, key).locator("svg.lines").bounding_box()["height"] > 190


def test_the_contents_lead_to_every_part_of_the_page(run_page, open_page):
    page = open_page(run_page).page
    links = page.locator("#contents a")
    names = links.all_text_contents()
    assert names[0] == "What the student wrote"
    assert {"Distance to the teacher", "Tokens", "Results", "Settings", "About this page"} <= set(names)
    for i, name in enumerate(names):
        links.nth(i).click()
        target = page.locator(page.evaluate("location.hash"))
        assert name in target.inner_text()


def test_what_has_one_value_throughout_is_folded_away(run_page, open_page):
    page = open_page(run_page).page
    assert not panel(page, "lr").is_visible()
    page.locator("#section-gradient summary").click()
    panel(page, "lr").locator("svg.lines").wait_for()
