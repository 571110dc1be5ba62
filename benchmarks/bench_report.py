"""How fast the report's page opens for a run of 200,000 tokens, against an empty page in the same browser.

Two runs of 200,000 tokens: 20,000 steps of 10 (ten thousand more records than a page can draw: down-sampled), and 200
steps of 1,000; each with 16 recorded rollouts of 512 tokens, both sides' lists of 20 beside every token. The pages take
turns (empty, long, wide, empty, ...) in one Chromium; opened means loaded, parsed, every panel drawn and painted.

    python benchmarks/bench_report.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from replies import machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.report.made import rollout, token, write_run  # noqa: E402
from topkd.report.load.collection import gather  # noqa: E402
from topkd.report.page.content import build_content  # noqa: E402
from topkd.report.page.html import render_page  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "report.json"
EMPTY = "<!doctype html><html lang=en data-ready=true><title>empty</title><body>"


def run_of_200k(folder: Path, steps: int) -> Path:
    path = write_run(folder, steps=steps, every=steps // 10, rollouts=0)
    lines = []
    for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "step":
            record["tokens"] = 200_000 // steps
        lines.append(json.dumps(record) + "\n")
    (path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    with (path / "tokens.jsonl").open("w", encoding="utf-8") as file:
        for at in range(16):
            words = [f" word{i % 97}" for i in range(512)]
            texts = {str(i): f" word{i}" for i in range(60)}
            record = rollout(at + 1, nasty="a prompt")
            record |= {"texts": texts, "tokens": [token(i, words[i], k=20) for i in range(512)]}
            file.write(json.dumps(record) + "\n")
    return path


def opened(browser: Any, path: Path) -> float:
    """Seconds from asking for the page to its first painted frame after everything is drawn."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    began = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")
    seconds = time.perf_counter() - began
    page.context.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        pages = {"empty": folder / "empty.html"}
        pages["empty"].write_text(EMPTY, encoding="utf-8")
        made_s = {}
        for shape, steps in (("20,000 steps of 10", 20_000), ("200 steps of 1,000", 200)):
            run = run_of_200k(folder / str(steps), steps)
            began = time.perf_counter()
            pages[shape] = folder / f"{steps}.html"
            pages[shape].write_text(render_page(build_content(gather([run]))), encoding="utf-8")
            made_s[shape] = time.perf_counter() - began
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        times: dict[str, list[float]] = {shape: [] for shape in pages}
        for _ in range(args.rounds):
            for shape, path in pages.items():
                times[shape].append(opened(browser, path))
        version = browser.version
        browser.close()
        empty = statistics.median(times["empty"])
        rows = [
            {
                "run": shape,
                "page_mb": round(path.stat().st_size / 1e6, 2),
                "opened_s": round(statistics.median(times[shape]), 3),
                "against_empty": round(statistics.median(times[shape]) / empty, 1),
                "made_s": round(made_s.get(shape, 0.0), 2),
            }
            for shape, path in pages.items()
        ]
    facts = {"machine": machine(), "chromium": version, "rounds": args.rounds, "results": rows}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{row['run']:<20} {row['page_mb']:>6} MB  {row['opened_s']:.3f} s  {row['against_empty']}x the empty page"
        )


if __name__ == "__main__":
    main()
