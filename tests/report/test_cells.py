"""A comparison in the middle of its work has a page too: its cells so far, and no verdict of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.report.made import write_comparison, write_run
from tests.report.test_live import get, news_of
from topkd.report.load.collection import gather
from topkd.report.page.content import build_content
from topkd.report.page.live_server import LivePage


def test_the_cells_so_far_are_told_by_their_arms_and_replays_are_kept_apart(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp", finished=False)
    page = build_content(gather([folder]))
    assert page.title == "scalar against top-K"
    assert [(group.label, len(group.runs), group.replayed) for group in page.groups] == [
        ("sampled token", 3, False),
        ("top-20", 3, False),
        ("sampled token, replayed", 3, True),
        ("top-20, replayed", 3, True),
    ]
    assert page.verdict.headline == "Not finished: 12 runs so far, and no verdict"
    assert page.verdict.detail.startswith("So far: top-20 wins: KL(student ‖ teacher) lower by 0.3")
    assert any("the comparison in cmp is not finished" in warning for warning in page.verdict.warnings)
    assert [one["key"] for one in page.data["seeds"]] == ["last"]


def test_trials_of_learning_rates_are_shown_only_while_there_is_nothing_else(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp", finished=False)
    for rate in ("0.0003", "1e-05"):
        write_run(folder / "cells" / f"tune-topk_pg-lr{rate}-seed1000", "topk_pg", seed=1000)
    collection = gather([folder])
    assert len(collection.runs) == 12
    assert "2 tuning trials are left out" in collection.notes[0]
    for cell in (folder / "cells").glob("[lr]*"):
        shutil.rmtree(cell)
    collection = gather([folder])
    assert [group.label for group in collection.groups()] == ["lr 0.0003", "lr 1e-05"]
    assert "all of them are trials" in collection.notes[0]


def test_a_page_that_follows_a_comparison_sees_new_cells_and_its_verdict(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp", finished=False)
    kept = tmp_path / "kept"
    shutil.move(folder / "cells", kept)
    (folder / "cells").mkdir()
    with LivePage([folder]) as page:
        assert "Waiting for the first step" in get(page, "/")[1]
        news = news_of(page)
        shutil.move(kept / "live-topk_pg-seed0", folder / "cells")
        news = news_of(page, news["version"])
        assert news["data"]["state"]["text"] == "finished, step 20 of 20"
        shutil.rmtree(folder)
        write_comparison(folder)
        news = news_of(page, news["version"])
        assert "top-20 wins: its area under" in news["html"]["verdict"]
