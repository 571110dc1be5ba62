"""Comparisons that really train, on the embedded pair."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.fakes.interrupts import interruptible
from topkd.compose.compare import compare
from topkd.compose.comparison.cell import read_finished
from topkd.compose.comparison.config import CompareConfig
from topkd.compose.demo_assets.assets import build_assets, cache_root
from topkd.compose.progress import Progress
from topkd.topk.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ARMS = [
    {"name": "scalar", "set": {"k": 1, "objective": {"kind": "scalar_kl"}}},
    {"name": "topk", "set": {"objective": {"kind": "topk_pg"}}},
]
SMALL = {
    "overrides": {"steps": 6, "eval_every": 3, "rollout": {"prompts_per_step": 4, "max_completion_tokens": 8}},
    "probes": 6,
    "workers": 1,
}


@pytest.fixture(scope="module", autouse=True)
def assets():
    build_assets(cache_root(), Progress())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = CompareConfig.model_validate({"arms": ARMS, "seeds": [0, 1], "replay": True, **SMALL})
    return config, compare(config, tmp_path_factory.mktemp("whole") / "out")


def measured(out):
    """Every cell's evaluations and counts, without what a clock says."""
    found = {}
    for path in sorted((out / "cells").iterdir()):
        result = json.loads((path / "result.json").read_text())
        found[path.name] = {key: value for key, value in result.items() if key != "seconds"}
    return found


def test_every_step_of_every_arm_learns_from_as_many_valid_tokens(whole):
    _, done = whole
    assert done.complete
    assert {tuple(cell["tokens_per_step"]) for cell in measured(done.out).values()} == {(32,)}


def test_arms_of_one_seed_start_from_the_same_measurements_and_differ_afterwards(whole):
    cells = measured(whole[1].out)
    scalar, topk = (cells[f"live-{arm}-seed0"]["evals"] for arm in ("scalar", "topk"))
    assert scalar[0] == topk[0]
    assert scalar[-1] != topk[-1]


def test_three_kinds_of_prefix_and_the_task_are_measured(whole):
    record = measured(whole[1].out)["live-topk-seed0"]["evals"][-1]
    values = [record["reverse_kl"], record["fresh"]["reverse_kl"], record["teacher"]["reverse_kl"]]
    assert len(set(values)) == 3
    assert 0.0 < record["accuracy"] < 1.0


def test_the_reference_arm_replayed_from_its_own_rollouts_is_the_live_run_again(whole):
    cells = measured(whole[1].out)
    live, replay = (cells[f"{phase}-scalar-seed1"] for phase in ("live", "replay"))
    assert live["evals"] == replay["evals"]


def test_the_scalar_arms_pay_for_one_logprob_a_token(whole):
    cells = measured(whole[1].out)
    scalar, topk = (cells[f"live-{arm}-seed0"] for arm in ("scalar", "topk"))
    assert scalar["teacher_entries"] == scalar["teacher_tokens"]
    assert topk["teacher_entries"] == 21 * topk["teacher_tokens"]


def alive(group):
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_comparison_continues_to_the_same_result(whole, tmp_path):
    config, done = whole
    (tmp_path / "config.json").write_text(config.model_dump_json())
    code = (
        "from pathlib import Path\n"
        "from topkd.compose.compare import compare\n"
        "from topkd.compose.comparison.config import CompareConfig\n"
        "if __name__ == '__main__':\n"
        f"    compare(CompareConfig.model_validate_json(Path({str(tmp_path / 'config.json')!r}).read_text()),"
        f" Path({str(tmp_path / 'out')!r}))\n"
    )
    (tmp_path / "main.py").write_text(code)
    child = subprocess.Popen([sys.executable, tmp_path / "main.py"], start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while len(list((tmp_path / "out" / "cells").glob("*/result.json"))) < 3:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.kill()
        child.wait()
        deadline = time.monotonic() + 240
        while alive(child.pid):  # its workers and the keeper of their semaphores go with it
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").glob("*/result.json")}
    again = compare(config, tmp_path / "out")
    assert measured(again.out) == measured(done.out)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # finished cells were read, not run


@pytest.mark.parametrize("moment", ["config.json", "cells/*"])
def test_ctrl_c_is_one_line_and_leaves_no_process(tmp_path, moment):
    """While workers are being born, and while they train: the whole group gets the signal, as from a terminal."""
    command = [sys.executable, "-m", "topkd", "compare", "--grid", "k=5,20", "--seeds", "0", "--set", "steps=200"]
    with interruptible(
        [*command, "--out", str(tmp_path / "out")], start_new_session=True, stderr=subprocess.PIPE
    ) as child:
        try:
            deadline = time.monotonic() + 240
            while not list((tmp_path / "out").glob(moment)):
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(2.0)  # in the middle of it
            os.killpg(child.pid, signal.SIGINT)
            _, told = child.communicate(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 130
    assert f"topkd: stopped; the same command continues the comparison in {tmp_path / 'out'}\n" in told
    assert "Traceback" not in told


def test_a_cell_whose_settings_changed_is_not_taken_for_finished(whole):
    config, done = whole
    from topkd.compose.compare import _build_cell

    cell = _build_cell(config, config.arms[0], 0, None, "live")
    assert read_finished(done.out / "cells", cell) is not None
    wider = config.model_copy(update={"probes": 7})
    assert read_finished(done.out / "cells", _build_cell(wider, config.arms[0], 0, None, "live")) is None


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    config = CompareConfig.model_validate({"arms": ARMS, "seeds": [0], **SMALL})
    with pytest.raises(ConfigError, match="is not a comparison's"):
        compare(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_arm_that_fails_is_named_and_the_others_are_kept(tmp_path):
    broken = {"name": "broken", "set": {"rollout": {"max_prompt_tokens": 4}}}
    config = CompareConfig.model_validate({"arms": [ARMS[1], broken], "seeds": [0], **SMALL})
    done = compare(config, tmp_path / "out")
    assert not done.complete
    assert "longer than rollout.max_prompt_tokens" in done.summary["failed"]["live-broken-seed0"]
    assert [bool(row["seeds"]) for row in done.summary["live"]["arms"]] == [True, False]
