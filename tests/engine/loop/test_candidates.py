"""The teacher's rows on the student's list, or on both: exact, whole in mass, refused where nobody can give them."""

import numpy as np
import pytest
import torch

from tests.engine.pieces import model_folder
from topkd.engine.config.engine_config import EngineConfig, RolloutConfig
from topkd.engine.config.learner import LearnerConfig
from topkd.engine.config.objectives import TopKPolicyGradient
from topkd.engine.learner.learner import Learner
from topkd.engine.loop.loop import LoopParts, distil
from topkd.engine.loop.metrics import MetricsLog
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.scoring import build_support_rows, check_support, move_to_support
from topkd.engine.models.divergences import Probe, exact_divergences
from topkd.engine.models.local_teacher import LocalTeacher
from topkd.engine.models.sampler import InProcessSampler
from topkd.engine.models.student import Student
from topkd.topk import SamplingParams, TopK
from topkd.topk.errors import ConfigError

K = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [Student.load(str(model_folder(root / str(seed), seed=seed)), "cpu") for seed in (1, 2)]


@pytest.mark.parametrize("support", ["student", "union"])
async def test_rows_on_a_support_are_the_teachers_own_probabilities_and_the_tail_is_the_rest(models, support):
    student, teacher = models
    [rollout] = await InProcessSampler(student).sample([5, 6, 7], 1, SamplingParams(max_tokens=12, seed=3), k=K)
    ids = [5, 6, 7, *rollout.completion_ids.tolist()]
    scores = await LocalTeacher(teacher).score(ids, 2, K)
    rows = await move_to_support(LocalTeacher(teacher), ids, scores, rollout, support)
    with torch.inference_mode():
        logits = teacher.model(input_ids=torch.tensor([ids])).logits[0, 2:-1]
    exact = torch.log_softmax(logits.double(), dim=-1).numpy()
    for r in range(rows.rows):
        mine, theirs = set(rollout.topk.ids[r].tolist()), set(scores.ids[r].tolist())
        listed = rows.ids[r][rows.ids[r] >= 0].tolist()
        assert set(listed) == (mine if support == "student" else mine | theirs)
        np.testing.assert_allclose(rows.logp[r, : len(listed)], exact[r, listed], atol=1e-5)
        rest = 1.0 - np.exp(exact[r, listed]).sum()
        assert np.exp(rows.tail_logp[r]) == pytest.approx(rest, abs=1e-6)
    np.testing.assert_array_equal(rows.actual_logp, scores.actual_logp)
    assert len({tuple(sorted(row)) for row in rows.ids.tolist()}) > 1


def test_zero_probability_pads_and_holes_stay_what_they_are():
    scores = TopK.from_lists(
        [[(4, np.log(0.5)), (9, np.log(0.25))], None], actual_ids=[4, 4], actual_logp=[-0.7, np.nan]
    )
    wanted = np.array([[9, 7, -1], [3, 4, 5]], dtype=np.int32)
    values = np.array([[np.log(0.25), -np.inf, -np.inf], [-1.0, -2.0, -3.0]], dtype=np.float32)
    union = build_support_rows(scores, wanted, values, "union")
    assert union.ids[0].tolist() == [4, 9, 7, -1, -1], "7 is known to have no probability; a pad is no token"
    assert np.exp(union.tail_logp[0]) == pytest.approx(0.25, abs=1e-6)
    assert union.ids[1].tolist() == [-1] * 5
    assert np.isnan(union.tail_logp[1])
    assert not union.signal[1]
    alone = build_support_rows(scores, wanted, values, "student")
    assert alone.ids[0].tolist() == [9, 7, -1]
    assert np.exp(alone.tail_logp[0]) == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize("support", ["student", "union"])
async def test_a_run_on_the_students_support_comes_closer_to_its_teacher(models, tmp_path, support):
    fresh, teacher = Student.load(models[0].model.name_or_path, "cpu"), models[1]
    objective = TopKPolicyGradient(support=support)
    config = EngineConfig(
        steps=30,
        seed=3,
        k=20,
        objective=objective,
        rollout=RolloutConfig(prompts_per_step=6, samples_per_prompt=2, max_completion_tokens=8),
        learner=LearnerConfig(lr=3e-3),
    )
    sampler = InProcessSampler(fresh)
    probes = [Probe(np.array([5 + i, 9, 30 + i, 40]), 2) for i in range(12)]
    before = exact_divergences(fresh, teacher, probes)["reverse_kl"]
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        records = await distil(
            LoopParts(
                config,
                [PromptRow([5 + i, 9], [5 + i, 9], "", f"row{i}") for i in range(12)],
                sampler,
                {"": LocalTeacher(teacher)},
            ),
            Learner(fresh, config.learner, objective, lock=sampler.lock, steps=30),
            log,
        )
    assert exact_divergences(fresh, teacher, probes)["reverse_kl"] < 0.9 * before
    assert all(record["masked_tokens"] == 0 for record in records)


def test_a_teacher_that_scores_no_chosen_ids_is_refused_before_anything_is_asked():
    class Plain:
        async def score(self, ids, start, k):
            raise AssertionError("asked")

    check_support("teacher", {"maths": Plain()})
    with pytest.raises(ConfigError, match=r"support = 'union' needs a teacher that scores chosen ids.*maths.*Plain"):
        check_support("union", {"maths": Plain()})
