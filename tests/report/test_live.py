"""A live page shows what a run has written since, to this machine only."""

from __future__ import annotations

import http.client
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.report.made import evaluation, write_run
from topkd.compose.run.folder import lock_folder
from topkd.report.page import live_server as live
from topkd.report.page.content import build_content
from topkd.report.page.live_server import LivePage
from topkd.topk.errors import ConfigError


def get(page: LivePage, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=240)
    try:
        connection.request("GET", path, headers={"Host": host} if host else {})
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def news_of(page: LivePage, since: str = "") -> dict[str, Any]:
    """The next news: a page that was made just now is given again for a moment."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        status, text = get(page, f"/data.json?since={since}")
        if status == 200:
            news: dict[str, Any] = json.loads(text)
            return news
        time.sleep(0.02)
    pytest.fail("no news")


def lines(news: dict[str, Any], key: str) -> dict[str, Any]:
    found = [panel for section in news["data"]["sections"] for panel in section["panels"] if panel["key"] == key]
    return found[0]["lines"]["fixed"][0]


def test_new_records_reach_the_page_and_nothing_is_sent_twice(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", done=20)
    with LivePage([path]) as page:
        status, text = get(page, "/")
        assert status == 200
        assert "connect-src &#39;self&#39;" in text
        assert "requests updates from the run's server on this machine" in text
        news = json.loads(get(page, "/data.json")[1])
        assert news["data"]["state"] == {"running": 1, "steps": 20, "text": "running, step 20 of 60"}
        assert get(page, f"/data.json?since={news['version']}") == (204, "")
        with (path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(evaluation(30, "topk_pg", 0, 60)) + "\n")
        later = news_of(page, news["version"])
        assert later["version"] != news["version"]
        assert lines(later, "reverse_kl")["x"]["step"] == [*lines(news, "reverse_kl")["x"]["step"], 30]
        assert "1.75" in later["html"]["verdict"]


def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with LivePage([tmp_path / "run"]) as page:
        news = json.loads(get(page, "/data.json")[1])
        assert "Waiting for the first step" in news["html"]["verdict"]
        write_run(tmp_path / "run", done=10)
        news = news_of(page, news["version"])
        assert "KL(student ‖ teacher) fell" in news["html"]["verdict"]
        assert news["data"]["state"]["text"] == "running, step 10 of 60"


def test_a_run_that_is_killed_and_one_that_goes_on_are_told_without_a_new_record(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", done=20)
    with LivePage([path]) as page:
        with lock_folder(path):
            news = news_of(page)
            assert news["data"]["state"]["text"] == "running, step 20 of 60"
        news = news_of(page, news["version"])
        assert news["data"]["state"]["text"] == "unfinished, step 20 of 60"
        assert "no process of this machine works on it" in news["html"]["verdict"]
        with lock_folder(path):
            assert news_of(page, news["version"])["data"]["state"]["text"] == "running, step 20 of 60"


def test_rollouts_are_given_one_by_one_and_nothing_else_is(tmp_path: Path) -> None:
    with LivePage([write_run(tmp_path / "run")]) as page:
        assert '"rollout-0"' not in get(page, "/")[1]
        assert json.loads(get(page, "/rollout/1.json")[1])["step"] == 2
        for path in ("/rollout/2.json", "/rollout/-1.json", "/rollout/../metrics.jsonl", "/metrics.jsonl", "/x"):
            assert get(page, path)[0] == 404


def test_a_name_that_is_not_this_machines_is_refused(tmp_path: Path) -> None:
    with LivePage([write_run(tmp_path / "run")]) as page:
        assert get(page, "/", host=f"evil.example:{page.port}")[0] == 403
        assert get(page, "/data.json", host="evil.example")[0] == 403
        assert get(page, "/", host=f"localhost:{page.port}")[0] == 200


def test_a_run_log_that_is_cut_back_or_broken_does_not_end_the_page(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", done=30)
    with LivePage([path]) as page:
        first = news_of(page)
        write_run(path, done=12)
        news = news_of(page, first["version"])
        assert news["data"]["state"]["text"] == "running, step 12 of 60"
        with (path / "metrics.jsonl").open("a") as file:
            file.write("{nonsense\n")
        end = time.monotonic() + 240
        while (reply := get(page, "/data.json"))[0] == 200 and time.monotonic() < end:
            time.sleep(0.02)
        assert reply[0] == 500
        assert "unreadable line" in reply[1]
        write_run(path, done=40)
        assert news_of(page, news["version"])["data"]["state"]["text"] == "running, step 40 of 60"


def test_a_page_that_takes_long_to_make_takes_a_tenth_of_the_time_at_most(tmp_path: Path, monkeypatch) -> None:
    path = write_run(tmp_path / "run", done=20)
    made: list[float] = []
    now_s = 0.0

    def slow(*args: Any, **options: Any) -> Any:
        nonlocal now_s
        now_s += 1.0
        made.append(now_s)
        return build_content(*args, **options)

    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(live, "build_content", slow)
    with LivePage([path]) as page, (path / "metrics.jsonl").open("a") as file:
        for _ in range(25):
            file.write(json.dumps({"kind": "event", "event": "tick"}) + "\n")
            file.flush()
            assert get(page, "/data.json")[0] == 200
            now_s += 1.0
    assert made == [1.0, 11.0, 21.0], "a second's work, then nine of rest"


def test_a_port_that_is_taken_is_one_clear_line(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    with LivePage([path]) as page, pytest.raises(ConfigError, match=r"cannot serve the page .*: got .*; give another"):
        LivePage([path], page.port)
