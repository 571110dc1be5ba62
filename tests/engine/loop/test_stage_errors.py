"""Whatever stage fails: the run ends once, with that error, nothing keeps running, and the run can go on."""

import asyncio

import pytest
import torch

from tests.engine.loop.legs import leg, told
from tests.engine.pieces import model_folder
from topkd.engine.checkpoint.checkpoint import find_newest_checkpoint
from topkd.engine.loop.metrics import read_metrics
from topkd.topk.errors import AuthError, ConfigError, SyncError, TrainingError

# Which call fails, and how many steps are in the run log and the checkpoint then.
STAGES = {
    "sampler": (5, ConfigError("the sampler broke"), {3, 4}),
    "scorer": (31, AuthError("the scorer broke"), {3, 4, 5}),  # the sixth batch's first; the learner may be anywhere
    "on_batch": (5, ConfigError("on_batch broke"), {4}),
    "learner": (5, TrainingError("the learner broke"), {4}),
    "publish": (5, SyncError("the push broke"), {4, 5}),
    "capture": (5, OSError(28, "No space left on device"), {4}),
    "evaluate": (2, ValueError("the evaluation broke"), {4}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return model_folder(root / "student", seed=1), model_folder(root / "teacher", seed=2)


@pytest.fixture(scope="module")
def wholes(folders, tmp_path_factory):
    """Uninterrupted runs, with shared and with own weights."""
    out = tmp_path_factory.mktemp("whole")
    made = {own: asyncio.run(leg(folders, out / str(own), own_weights=own, every=3)) for own in (False, True)}
    return {own: (out / str(own), learner) for own, learner in made.items()}


@pytest.mark.parametrize(
    ("stage", "own_weights"),
    [(stage, own) for stage in STAGES for own in (False, True) if own or stage != "capture"],
    ids=lambda value: {True: "own weights", False: "shared weights"}.get(value, value),
)
async def test_an_error_ends_the_run_once_and_the_run_goes_on_from_there(folders, wholes, tmp_path, stage, own_weights):
    call, error, taken = STAGES[stage]
    with pytest.raises(type(error)) as caught:
        await asyncio.wait_for(
            leg(folders, tmp_path, own_weights=own_weights, every=3, broken=(stage, call, error)), timeout=240
        )
    assert caught.value is error  # itself, not a group of it and of what it cancelled
    assert asyncio.all_tasks() == {asyncio.current_task()}
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl", "step")]
    assert steps == [*range(1, len(steps) + 1)]
    assert len(steps) in taken
    assert find_newest_checkpoint(tmp_path, pytest.fail).position.step == len(steps)

    learner = await leg(folders, tmp_path, own_weights=own_weights, every=3)
    out, whole = wholes[own_weights]
    # What the push after the failing step would have told of itself is not known: "synced" is left out.
    resumed, expected = (
        [{key: value for key, value in record.items() if key != "synced"} for record in told(folder)]
        for folder in (tmp_path, out)
    )
    resumed, expected = ([r for r in records if r["kind"] != "event"] for records in (resumed, expected))
    assert resumed == expected or _redrawn(tmp_path)
    for name, value in whole.student.model.state_dict().items():
        assert torch.equal(value, learner.student.model.state_dict()[name]) or _redrawn(tmp_path)


def _redrawn(out):
    """Whether the error came while a batch of older weights was being drawn: a resumed run then draws it anew."""
    steps = read_metrics(out / "metrics.jsonl", "step")
    return any(record["staleness"] < min(record["step"] - 1, 1) for record in steps)


async def test_a_run_that_is_cancelled_keeps_what_it_learnt(folders, wholes, tmp_path):
    def third(kind, record):
        if kind == "step" and record["step"] == 3:
            run.cancel()

    run = asyncio.create_task(leg(folders, tmp_path, every=100, on_record=third))
    with pytest.raises(asyncio.CancelledError):
        await run
    taken = len(read_metrics(tmp_path / "metrics.jsonl", "step"))
    assert find_newest_checkpoint(tmp_path, pytest.fail).position.step == taken < 9
    await leg(folders, tmp_path, every=100)
    steps = [record for record in told(tmp_path) if record["kind"] == "step"]
    assert steps == [record for record in told(wholes[False][0]) if record["kind"] == "step"] or _redrawn(tmp_path)
