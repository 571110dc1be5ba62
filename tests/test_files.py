"""A file that is written whole or not at all."""

import threading

import pytest

from topkd.files import stage_file, write_atomically


def test_a_write_replaces_the_former_content_and_leaves_nothing_else(tmp_path):
    write_atomically(tmp_path / "a.json", "former")
    write_atomically(tmp_path / "a.json", "ä\n")
    assert (tmp_path / "a.json").read_bytes() == "ä\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_block_that_raises_leaves_the_former_content(tmp_path):
    write_atomically(tmp_path / "a", b"former")

    def write_half():
        with stage_file(tmp_path / "a") as staged:
            staged.write_bytes(b"half of i")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert (tmp_path / "a").read_bytes() == b"former"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_block_that_writes_nothing_leaves_the_former_file(tmp_path):
    write_atomically(tmp_path / "a", b"former")
    with stage_file(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_bytes() == b"former"


def test_writers_of_one_file_at_once_leave_the_whole_content_of_one_of_them(tmp_path):
    contents = [bytes([number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(tmp_path / "a", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() in contents
    assert len(list(tmp_path.iterdir())) == 1
