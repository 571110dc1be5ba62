"""The worker processes of a comparison, beside whatever else its caller runs."""

import multiprocessing
import os

import pytest

from topkd.compose import compare as module
from topkd.compose.comparison.cell import Cell, run_cell
from topkd.compose.comparison.config import CompareConfig
from topkd.compose.progress import Progress
from topkd.compose.run.folder import lock_folder
from topkd.topk.errors import ConfigError

CELL = Cell("tune-a-seed0", "tune", "a", 0, None, "embedded", {"steps": 1}, 1)


def return_threads(*_):
    """In place of a cell: what a worker was started with."""
    return os.environ["OMP_NUM_THREADS"], multiprocessing.current_process().pid


def echo(connection):
    """In a child: send back what comes."""
    while True:
        connection.send(connection.recv())


@pytest.fixture
def bystander():
    """The connection to a child process of the caller's own that sends back what it gets."""
    ours, child_end = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=echo, args=(child_end,))
    child.start()
    child_end.close()
    yield ours
    child.kill()
    child.join()


def test_workers_end_and_neither_other_children_nor_the_environment_change(tmp_path, monkeypatch, bystander):
    monkeypatch.setattr(module, "run_cell", return_threads)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = CompareConfig.model_validate({"arms": [{"name": "a"}], "seeds": [0], "workers": 1})
    with module._Workers(config, tmp_path, Progress()) as workers:
        threads, worker = workers._submit(CELL).result()
        assert worker in {child.pid for child in multiprocessing.active_children()}
        assert threads == str(workers.threads)
        assert "OMP_NUM_THREADS" not in os.environ
        mine = [child for child in multiprocessing.active_children() if child.pid == worker]
    for child in mine:
        child.join()
    bystander.send("still there")  # a signal that was sent before this arrives before it
    assert bystander.recv() == "still there"


def test_a_number_of_threads_that_the_caller_chose_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_cell", return_threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    config = CompareConfig.model_validate({"arms": [{"name": "a"}], "seeds": [0], "workers": 1})
    with module._Workers(config, tmp_path, Progress()) as workers:
        assert workers._submit(CELL).result()[0] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_cells_folder_that_another_process_works_in_is_refused_and_left_alone(tmp_path):
    run_log = tmp_path / CELL.id / "metrics.jsonl"
    with lock_folder(run_log.parent):
        run_log.write_text("")
        with pytest.raises(ConfigError, match="another process is at work on this run"):
            run_cell(str(tmp_path), CELL, 1)
        assert run_log.exists()
