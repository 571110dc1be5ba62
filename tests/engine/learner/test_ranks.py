"""Two processes over gloo give what one process gives: weights, and the run log's numbers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.learner.rank_worker import run
from tests.engine.pieces import model_folder
from topkd.engine.learner.distributed import Ranks

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


def two_processes(folder, objective, strategy, out):
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
         "tests.engine.learner.rank_worker", str(folder), objective, strategy, str(out)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=840, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "weights.pt"), json.loads((out / "records.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "strategy"), [("topk_pg", "ddp"), ("taid", "fsdp2"), ("topk_pg", "fsdp2")])
def test_two_ranks_take_the_steps_of_one_process(folder, tmp_path, objective, strategy):
    alone, records = run(str(folder), objective, strategy, Ranks())
    weights, theirs = two_processes(folder, objective, strategy, tmp_path / "out")
    start = torch.load(tmp_path / "out" / "weights.pt").keys()
    assert start == alone.model.state_dict().keys()
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)
    for one, two in zip(records, theirs, strict=True):
        assert one["tokens"] == two["tokens"] > 0
        assert one["sft_tokens"] == two["sft_tokens"] > 0
        for name in set(one) & set(two):
            if isinstance(one[name], float) and math.isfinite(one[name]):
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


def test_shares_of_a_step_are_its_parts_in_order():
    items = list(range(11))
    shares = [Ranks(rank, 3).slice(items) for rank in range(3)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
