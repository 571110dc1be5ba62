"""Checkpoints are whole or not used, and a run that goes on from one is the uninterrupted run."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from tests.engine.loop.legs import leg, told
from tests.engine.pieces import model_folder
from topkd.engine.checkpoint.checkpoint import FOLDER, find_newest_checkpoint, restore, save_checkpoint
from topkd.engine.checkpoint.snapshots import MANIFEST, find_fault, find_newest_snapshot, write_folder, write_snapshot
from topkd.engine.config.engine_config import EngineConfig
from topkd.engine.config.learner import LearnerConfig
from topkd.engine.learner.learner import Learner
from topkd.engine.loop.hooks import Position, Queued
from topkd.engine.loop.metrics import read_metrics
from topkd.engine.models.student import Student
from topkd.topk.errors import ConfigError, TrainingError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return model_folder(root / "student", seed=1), model_folder(root / "teacher", seed=2)


@pytest.mark.parametrize("own_weights", [False, True], ids=["shared weights", "own weights"])
@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(folders, tmp_path, staleness, own_weights):
    whole = await leg(folders, tmp_path / "whole", staleness=staleness, own_weights=own_weights)
    for stop_at in (3, 4, None):
        parts = await leg(folders, tmp_path / "parts", staleness=staleness, stop_at=stop_at, own_weights=own_weights)
    assert told(tmp_path / "parts") == told(tmp_path / "whole")
    assert [record["step"] for record in read_metrics(tmp_path / "parts" / "metrics.jsonl", "step")] == [*range(1, 10)]
    for name, value in whole.student.model.state_dict().items():
        assert torch.equal(value, parts.student.model.state_dict()[name])


async def test_rollouts_in_flight_are_in_the_checkpoint_unless_somebody_remembers_them(folders, tmp_path):
    await leg(folders, tmp_path / "kept", staleness=2, stop_at=4)
    await leg(folders, tmp_path / "left", staleness=2, stop_at=4, remembered=True)
    kept, left = (find_newest_checkpoint(tmp_path / name, pytest.fail) for name in ("kept", "left"))
    assert [(queued.step, queued.version) for queued in kept.position.queue] == [(4, 2), (5, 3)]
    assert all(len(queued.rollouts) == 6 for queued in kept.position.queue)
    assert [queued.rollouts for queued in left.position.queue] == [None, None]
    assert left.notes == {"a": 1}


async def test_a_batch_that_nobody_remembers_any_more_is_drawn_again_and_said(folders, tmp_path):
    await leg(folders, tmp_path, staleness=2, stop_at=4, remembered=True)
    await leg(folders, tmp_path, staleness=2)
    events = [event for event in read_metrics(tmp_path / "metrics.jsonl", "event") if event["event"] == "redrawn"]
    assert [(event["step"], event["versions"], event["now"]) for event in events] == [
        (5, ["2"], ["4"]), (6, ["3"], ["4"])
    ]  # fmt: skip
    steps = read_metrics(tmp_path / "metrics.jsonl", "step")
    assert [record["staleness"] for record in steps] == [0, 1, 2, 2, 0, 1, 2, 2, 2]


async def test_an_evaluation_that_the_stop_came_before_is_made_up_for(folders, tmp_path):
    await leg(folders, tmp_path, stop_at=4)
    at = find_newest_checkpoint(tmp_path, pytest.fail)
    assert (at.position.step, at.position.evaluated) == (4, 4)
    state = at.path / "state.json"
    values = json.loads(state.read_text())
    values["evaluated"] = 0  # as if evaluating step 4 had failed
    state.write_text(json.dumps(values))
    (at.path / MANIFEST).unlink()
    rewritten = {file.name: file.read_bytes() for file in at.path.iterdir()}
    write_snapshot(
        tmp_path / FOLDER, 4, lambda folder: [(folder / name).write_bytes(b) for name, b in rewritten.items()], keep=2
    )
    await leg(folders, tmp_path)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl", "eval")] == [0, 4, 4, 8, 9]


@pytest.fixture
def snapshots(tmp_path):
    for step in (5, 10):
        write_snapshot(tmp_path, step, lambda folder: (folder / "data").write_bytes(b"x" * 100), keep=3)
    return tmp_path


def flipped(path):
    data = bytearray((path / "data").read_bytes())
    data[50] ^= 1
    (path / "data").write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flipped, "data has another size or checksum"),
        (lambda path: (path / "data").write_bytes(b"x" * 99), "data has another size or checksum"),
        (lambda path: (path / "data").unlink(), "data is missing"),
        (lambda path: (path / MANIFEST).unlink(), "no manifest"),
        (lambda path: (path / MANIFEST).write_text('{"format": 1, "fi'), "manifest cannot be read"),
        (lambda path: (path / MANIFEST).write_text('{"format": 99, "files": {}}'), "format 99"),
    ],
    ids=["a flipped bit", "cut short", "a lost file", "no manifest", "a torn manifest", "another format"],
)
def test_a_damaged_snapshot_is_passed_over_and_named(snapshots, damage, words):
    heard = []
    damage(snapshots / "step-00000010")
    assert find_newest_snapshot(snapshots, heard.append) == snapshots / "step-00000005"
    assert len(heard) == 1
    assert "step-00000010" in heard[0]
    assert words in heard[0]


def test_a_snapshot_whose_writing_was_cut_off_at_any_point_is_not_there(snapshots):
    def dies(folder):
        (folder / "data").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_snapshot(snapshots, 15, dies, keep=3)
    assert find_newest_snapshot(snapshots, pytest.fail) == snapshots / "step-00000010"
    write_snapshot(snapshots, 20, lambda folder: (folder / "data").write_bytes(b"y"), keep=2)
    left = sorted(path.name for path in snapshots.iterdir())
    assert left == ["step-00000010", "step-00000020"]  # the wreck is gone, and only two stay


def test_a_snapshot_of_the_same_step_replaces_a_damaged_one(snapshots):
    flipped(snapshots / "step-00000010")
    write_snapshot(snapshots, 10, lambda folder: (folder / "data").write_bytes(b"new"), keep=3)
    assert find_fault(snapshots / "step-00000010") is None
    assert (snapshots / "step-00000010" / "data").read_bytes() == b"new"


def test_a_checkpoint_keeps_random_numbers_and_whatever_else_has_a_state(folders, tmp_path):
    class Average:
        def __init__(self):
            self.weights = {"a": torch.arange(3.0), "tied": torch.arange(3.0)}
            self.weights["tied"] = self.weights["a"]

        def state_dict(self):
            return self.weights

        def load_state_dict(self, state):
            self.weights = dict(state)

    student = Student.load(str(folders[0]), "cpu")
    learner = Learner(student, LearnerConfig(), EngineConfig().objective)
    average = Average()
    queue = (Queued(0, 0, ("",), 0.1, None, None),)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        save_checkpoint(
            tmp_path, Position(0, queue=queue), learner=learner, run_log_bytes=0, keep=1, remembered=False,
            stateful={"teacher": average},
        )  # fmt: skip
        drawn = torch.rand(3), np.random.random()  # noqa: NPY002
        found = find_newest_checkpoint(tmp_path, pytest.fail)
        other = Average()
        other.weights = {}
        restore(found, learner, {"teacher": other})
        assert torch.equal(torch.rand(3), drawn[0])
        assert np.random.random() == drawn[1]  # noqa: NPY002
    assert torch.equal(other.weights["tied"], average.weights["a"])
    assert found.position.queue == queue
    with pytest.raises(ConfigError, match=r"different stateful parts.*got \['teacher'\], expected \[\]"):
        restore(found, learner)


def test_weights_of_another_student_are_refused(folders, tmp_path):
    small = Student.load(str(model_folder(tmp_path / "small", hidden=16)), "cpu")
    config, objective = LearnerConfig(), EngineConfig().objective
    save_checkpoint(
        tmp_path, Position(1), learner=Learner(small, config, objective), run_log_bytes=0, keep=1, remembered=False
    )
    own = Learner(Student.load(str(folders[0]), "cpu"), config, objective)
    before = own.student.head.weight.clone()
    with pytest.raises(ConfigError, match="weights belong to another student"):
        restore(find_newest_checkpoint(tmp_path, pytest.fail), own)
    assert torch.equal(own.student.head.weight, before)
    shutil.rmtree(tmp_path / FOLDER)
    assert find_newest_checkpoint(tmp_path, pytest.fail) is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), TrainingError),
        (OSError(errno.ENOSPC, "No space left on device"), TrainingError),
        (PermissionError(errno.EACCES, "Permission denied"), ConfigError),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line_and_leaves_the_former_one(tmp_path, error, kind):
    place = write_folder(tmp_path / "student", lambda folder: (folder / "a").write_text("first"))

    def fill(folder):
        (folder / "a").write_text("half")
        raise error

    with pytest.raises(kind, match=r"cannot write the folder \(.*student\): got .*(No space left|Permission denied)"):
        write_folder(place, fill)
    assert (place / "a").read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"], "nothing half-written takes room"
