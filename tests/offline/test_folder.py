"""A folder becomes a cache once, whoever begins it, and one that holds anything else never does."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.offline.writer import TEACHER, item
from topkd.offline import ScoreStore, verify
from topkd.topk.errors import CacheError


def test_a_cache_begins_where_another_writer_was_killed_while_beginning_it(tmp_path):
    (tmp_path / ".topkd-store.json.4711.tmp").write_text('{"form')
    with ScoreStore(tmp_path, mode="a") as store:
        store.put(TEACHER, *item(1))
    assert verify(tmp_path).records == 1


def test_writers_that_begin_one_cache_at_once_all_get_it(tmp_path, monkeypatch):
    together = threading.Barrier(8)
    write = Path.write_bytes

    def slowly(path, content):
        write(path, content)
        time.sleep(0.02)
        return len(content)

    monkeypatch.setattr(Path, "write_bytes", slowly)

    def begin(number):
        together.wait(timeout=240)
        ScoreStore(tmp_path / str(number // 8), mode="a").close()

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(begin, range(8 * 3)))) == 8 * 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_that_is_no_cache_or_a_newer_one_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="not a topkd cache"):
        ScoreStore(tmp_path)
    with pytest.raises(CacheError, match="not a topkd cache"):
        ScoreStore(tmp_path, mode="a")  # never turns a folder with other things in it into a cache
    (tmp_path / "topkd-store.json").write_text('{"format": "topkd-store", "version": 2}')
    with pytest.raises(CacheError, match="newer topkd"):
        ScoreStore(tmp_path)
