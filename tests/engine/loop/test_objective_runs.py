"""Each objective runs from a config, through the loop, against a teacher; and data mixes in as it says."""

import numpy as np
import pytest

from tests.engine.pieces import model_folder
from topkd.engine.config.engine_config import EngineConfig
from topkd.engine.learner.learner import Learner
from topkd.engine.loop.data_mixing import (
    build_data_rollouts,
    build_data_texts,
    count_on_policy_prompts,
    select_data_rows,
)
from topkd.engine.loop.hooks import Hooks
from topkd.engine.loop.loop import LoopParts, distil
from topkd.engine.loop.metrics import MetricsLog
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.models.local_teacher import LocalTeacher
from topkd.engine.models.sampler import InProcessSampler
from topkd.engine.models.student import Student
from topkd.topk.errors import ConfigError

KINDS = ["scalar_kl", "gjs", "topk_pg", "fkl", "rkl", "gjs_direct", "taid", "entropy_aware", "eopd", "kd", "sft"]
ANSWERED = [
    PromptRow([5 + i, 9], [5 + i, 9], "", f"data{i}", np.array([20 + i, 21, 22]), np.array([True, False, True]))
    for i in range(4)
]
ROWS = [*ANSWERED, *(PromptRow([30 + i, 9], [30 + i, 9], "", f"row{i}") for i in range(8))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return model_folder(root / "student", seed=1), model_folder(root / "teacher", seed=2)


def config(kind, steps=3, **more):
    return EngineConfig.model_validate(
        {
            "steps": steps,
            "seed": 3,
            "k": 12,
            "objective": {"kind": kind},
            "rollout": {"prompts_per_step": 6, "samples_per_prompt": 2, "max_completion_tokens": 6},
            "learner": {"lr": 3e-3, "warmup_steps": 0},
        }
        | more
    )


class Counting(LocalTeacher):
    calls = 0

    async def score(self, ids, start, k):
        self.calls += 1
        return await super().score(ids, start, k)


async def run(folders, tmp_path, engine, rows=ROWS):
    student, teacher = (Student.load(str(folder), "cpu") for folder in folders)
    sampler, scorer = InProcessSampler(student), Counting(teacher)
    learner = Learner(student, engine.learner, engine.objective, lock=sampler.lock, steps=engine.steps)

    async def label(version):
        sampler.version = str(version)

    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        records = await distil(LoopParts(engine, rows, sampler, {"": scorer}), learner, log, hooks=Hooks(publish=label))
    return records, scorer.calls


@pytest.mark.parametrize("kind", KINDS)
async def test_every_objective_of_a_config_trains(folders, tmp_path, kind):
    records, calls = await run(folders, tmp_path, config(kind))
    assert [record["divergence_mode"] for record in records] == [kind] * 3
    assert all(record["skipped"] == "" and record["tokens"] > 0 for record in records)
    assert calls == (0 if kind == "sft" else 36)
    assert len({record["loss"] for record in records}) == 3
    assert [record["staleness"] for record in records] == ([None] * 3 if kind == "sft" else [0, 1, 1])
    assert len({frozenset(record) for record in records}) == 1, "the first step is like the others"
    for record in records if kind != "sft" else []:
        assert sum(record["ratio_hist"]) == record["tokens"]
        assert 0 < record["ess"] <= 1 + 1e-9
        assert record["effective_coefficient"] > 0
        assert record["kl_k3"] > 0 <= record["behavior_kl_k3"]
        assert record["missing_mass"] == 0.0
        assert record["teacher_mass"] + record["tail_mass"] == pytest.approx(1.0, abs=1e-5)
        assert 0 < record["entropy_lo"] < record["entropy_hi"]
        assert 0 <= record["clip_fraction"] < 0.5
    if kind != "sft":
        assert records[0]["mismatch_kl"] == pytest.approx(0.0, abs=1e-9), "of the weights that drew it"
        assert records[0]["ess"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["fkl", "rkl", "gjs_direct", "taid", "kd"])
async def test_a_direct_loss_falls(folders, tmp_path, kind):
    """By the sampled estimate of KL(S||T), which all of them share."""
    records, _ = await run(folders, tmp_path, config(kind, steps=30))
    first, last = (np.mean([record["kl_k1"] for record in part]) for part in (records[:5], records[-5:]))
    assert last < 0.95 * first


async def test_a_share_of_each_step_comes_from_the_data_and_trains_by_cross_entropy(folders, tmp_path):
    engine = config("topk_pg", on_policy_fraction=0.5)
    records, calls = await run(folders, tmp_path, engine)
    assert calls == 3 * 3 * 2  # half of the prompts, twice each
    assert [record["sft_tokens"] for record in records] == [3 * 2] * 3  # three rows, two of three tokens train
    assert all(record["completion_tokens"] == record["tokens"] - 6 for record in records)


async def test_the_teacher_scores_the_datas_completions_for_a_direct_loss(folders, tmp_path):
    engine = config("gjs_direct", on_policy_fraction=0.5, data_loss="objective")
    records, calls = await run(folders, tmp_path, engine)
    assert calls == 3 * (6 + 3)
    assert all("sft_tokens" not in record for record in records)
    assert all("data" in record["rollout_versions"] for record in records)
    assert all(record["masked_tokens"] == 0 and record["ess"] > 0 for record in records)


def test_which_rows_a_step_takes_depends_on_seed_and_step_alone():
    engine = config("topk_pg", on_policy_fraction=0.34)
    assert count_on_policy_prompts(engine) == 2
    names = [[row.sample_id for row in select_data_rows(engine, ROWS, step)] for step in range(3)]
    assert names == [[row.sample_id for row in select_data_rows(engine, ROWS, step)] for step in range(3)]
    assert all(name.startswith("data") for step in names for name in step)
    assert sorted(name for step in names for name in step) == sorted([f"data{i}" for i in range(4)] * 3)
    assert build_data_rollouts(engine, ROWS, 0) == ([], [])
    text = build_data_texts(engine, ROWS, 0)[0].core
    assert text.mask.tolist() == [True, False, True]
    assert build_data_texts(config("gjs_direct", on_policy_fraction=0.34, data_loss="objective"), ROWS, 0) == []


@pytest.mark.parametrize("fraction", [0.9, 0.1])
async def test_a_mixture_that_rounds_to_one_side_alone_is_refused(folders, tmp_path, fraction):
    engine = config("gjs_direct", on_policy_fraction=fraction, rollout={"prompts_per_step": 4})
    assert count_on_policy_prompts(engine) == (4 if fraction > 0.5 else 0)
    with pytest.raises(ConfigError, match="too small for on_policy_fraction"):
        await run(folders, tmp_path, engine)


async def test_a_mixture_without_data_is_refused(folders, tmp_path):
    for engine in (config("sft"), config("topk_pg", on_policy_fraction=0.5)):
        with pytest.raises(ConfigError, match="no row has one"):
            await run(folders, tmp_path, engine, rows=ROWS[4:])
