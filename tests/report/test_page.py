"""The page is one file that loads nothing, and lets nothing out of its data."""

from __future__ import annotations

import base64
import gc
import hashlib
import html
import json
import re
import tracemalloc
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.made import NASTY, rollout, token, write_comparison, write_run
from topkd.report.load.collection import gather
from topkd.report.page.content import build_content
from topkd.report.page.html import escape_json, render_page
from topkd.report.page.token_explorer import select_transcripts
from topkd.topk.errors import DataError


class Elements(HTMLParser):
    """Collects tags, and the text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, dict[str, str | None], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:
            self.texts.append((*self.tags[-1], data))


def parsed(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    return elements


def nasty_run(folder: Path) -> Path:
    """A run in which every text that the page may show tries to break out of it."""
    path = write_run(folder / NASTY.replace("/", "_")[:40])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"student": {"model": NASTY}, NASTY: NASTY}))
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "event": "alarm", "message": NASTY}) + "\n")
        file.write(json.dumps({"kind": "eval", "step": 60, "prefixes": NASTY, "reverse_kl": 1.0}) + "\n")
    return path


def test_no_text_of_a_run_becomes_an_element(tmp_path: Path) -> None:
    elements = parsed(render_page(build_content(gather([nasty_run(tmp_path)]))))
    tags = [tag for tag, _ in elements.tags]
    assert "img" not in tags
    scripts = [attrs for tag, attrs in elements.tags if tag == "script"]
    assert len([attrs for attrs in scripts if attrs.get("type") is None]) == 1
    assert {attrs.get("type") for attrs in scripts} == {None, "application/json"}


def test_embedded_texts_come_back_as_they_were(tmp_path: Path) -> None:
    elements = parsed(render_page(build_content(gather([nasty_run(tmp_path)]))))
    bodies = [text for tag, attrs, text in elements.texts if (attrs.get("id") or "").startswith("rollout-")]
    assert len(bodies) == 2
    body = json.loads(bodies[0])
    assert body["prompt"] == f"Say something: {NASTY}"
    assert body["tokens"][0]["text"] == NASTY
    assert body["texts"]["11"] == f"t1{NASTY}"
    assert not set("<>&") & set(escape_json(NASTY))
    assert json.loads(escape_json(json.dumps(NASTY, ensure_ascii=False))) == NASTY


def test_the_policy_allows_this_script_and_this_style_and_no_connection(tmp_path: Path) -> None:
    text = render_page(build_content(gather([nasty_run(tmp_path)])))
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1])
    found = {tag: body for tag, attrs, body in parsed(text).texts if not attrs.get("type")}
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(found[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_page_names_no_address_to_load_from(tmp_path: Path) -> None:
    text = render_page(build_content(gather([write_comparison(tmp_path / "cmp")])))
    for tag, attrs in parsed(text).tags:
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attrs.get(name) or "#")[0] == "#" or attrs[name] == "data:,", (tag, attrs)
        assert not [name for name in attrs if name.startswith("on") or name == "style"], (tag, attrs)
    addresses = set(re.findall(r"https?://[^\s'\"<]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace, not a place
    assert "@import" not in text
    assert "url(" not in text


def test_rollouts_over_the_budget_are_left_out_evenly_and_counted(tmp_path: Path) -> None:
    groups = gather([write_run(tmp_path / "run", rollouts=40)]).groups()
    whole = select_transcripts(groups)
    assert (len(whole.heads), whole.note) == (40, "")
    part = select_transcripts(groups, budget=sum(map(len, whole.bodies)) // 4)
    assert 5 <= len(part.heads) <= 20
    assert part.note == f"{len(part.heads)} of 40 recorded rollouts are on this page; tokens.jsonl has all."
    steps = [head["step"] for head in part.heads]
    assert steps[0] <= 6
    assert steps[-1] >= 34


def _traced_peak(work: Callable[[], object]) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_page_holds_the_rollouts_it_shows_and_not_their_file(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", rollouts=0, steps=20)
    line = json.dumps(rollout(1) | {"tokens": [token(n, "word ", k=20) for n in range(60)]}) + "\n"
    peaks = []
    for count in (60, 240):
        (path / "tokens.jsonl").write_text(line * count)
        peaks.append(_traced_peak(lambda: select_transcripts(gather([path]).groups(), budget=200_000)))
    grown = len(line) * 180
    assert grown > 1_500_000
    assert peaks[1] - peaks[0] < grown / 10, "before, five to ten times what the file had grown by"


def test_a_rollout_whose_file_was_cut_meanwhile_is_an_error_and_not_another_rollout(tmp_path: Path) -> None:
    run = gather([write_run(tmp_path / "run", rollouts=3)])
    (tmp_path / "run" / "tokens.jsonl").write_text("")
    with pytest.raises(DataError, match=r"changed while they were read.*make the page again"):
        select_transcripts(run.groups())


def test_a_rollout_that_says_nonsense_is_shown_as_unknown(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", rollouts=0)
    token = {
        "id": 3,
        "text": 5,
        "advantage": "much",
        "divergence": None,
        "teacher": [[1, -0.1], "x", [2]],
        "student": 7,
    }
    (path / "tokens.jsonl").write_text(json.dumps({"step": 1, "tokens": [token, None]}) + "\n")
    (body,) = map(json.loads, select_transcripts(gather([path]).groups()).bodies)
    (shown,) = body["tokens"]
    assert (shown["a"], shown["d"], shown["b"]) == (None, None, None)
    assert shown["T"] == [[1, -0.1]]
    assert shown["S"] is None
