"""Every objective of a config is the loss it names: its gradient is that of the dense formula, written out here."""

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.engine.pieces import VOCAB, model_folder, scalar_sample, topk_sample
from topkd.engine.config.engine_config import EngineConfig
from topkd.engine.config.learner import ImportanceSampling, LearnerConfig
from topkd.engine.config.objectives import (
    EOPD,
    GJS,
    KD,
    SFT,
    TAID,
    DirectGJS,
    EntropyAware,
    ForwardKL,
    Objective,
    ReverseKL,
    ScalarKL,
    TopKPolicyGradient,
)
from topkd.engine.learner.learner import Learner
from topkd.engine.learner.losses import LOSSES, mean_advantage
from topkd.engine.models.student import Student
from topkd.topk.errors import ConfigError
from topkd.topk.losses import KDLoss, SparseTeacher

BIG = 1e9
RUN_LOG = Path(__file__).parents[3] / "docs" / "run-log.md"
ALL = [ScalarKL(), GJS(), TopKPolicyGradient(), ForwardKL(), ReverseKL(), DirectGJS(), KD(), TAID(), EntropyAware()]
ALL += [EOPD()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def teacher(folder):
    return Student.load(str(model_folder(folder.parent / "teacher", seed=5)), "cpu")


def dense(model, sample):
    """Logprobs [C, V] in float64, with graph."""
    ids = torch.tensor(sample.core.full_ids.astype(np.int64))[None]
    logits = model.model(input_ids=ids[:, :-1]).logits[0].double()
    return torch.log_softmax(logits[sample.core.prompt_len - 1 :], -1)


def scored(teacher, prompt, completion, k=VOCAB, behavior=None):
    """A sample with the teacher's exact K best; K = V leaves nothing outside the list."""
    blank = scalar_sample(prompt, completion, np.zeros(len(completion)), np.zeros(len(completion)))
    with torch.no_grad():
        logp = dense(teacher, blank).numpy()
    lists = [[(int(v), float(row[v])) for v in np.argsort(-row)[:k]] for row in logp]
    actual = logp[np.arange(len(completion)), completion]
    return topk_sample(
        prompt, completion, lists, actual, np.full(len(completion), -5.0) if behavior is None else behavior
    )


def gradients(folder, samples, objective, **config):
    student = Student.load(str(folder), "cpu")
    learner = Learner(student, LearnerConfig(max_grad_norm=BIG, **config), objective, steps=10)
    seen = {}
    learner._optimizer.step = lambda: seen.update(
        {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
    )
    return seen, learner.step(samples)


def reference(folder, samples, loss_of):
    """Gradients of sum over samples of ``loss_of(student logp, sample)`` divided by the tokens."""
    student = Student.load(str(folder), "cpu")
    tokens = sum(sample.core.completion_len for sample in samples)
    (sum(loss_of(dense(student, sample), sample) for sample in samples) / tokens).backward()
    return {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}


def same(got, wanted, rtol=5e-3, atol=5e-6):
    assert got.keys() == wanted.keys()
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=rtol, atol=atol)


def teacher_dense(teacher, sample):
    with torch.no_grad():
        return dense(teacher, sample)


def kl(first, second):
    return (first.exp() * (first - second)).sum(-1)


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        (ForwardKL(), lambda s, t: kl(t, s)),
        (ReverseKL(), kl),
        (ForwardKL(tail="renormalise"), lambda s, t: kl(t, s)),
        (
            DirectGJS(beta=0.3),
            lambda s, t: 0.3 * kl(t, m := torch.logaddexp(t + math.log(0.3), s + math.log(0.7))) + 0.7 * kl(s, m),
        ),
        (KD(), lambda s, t: -(t.exp() * s).sum(-1)),
        (TAID(t_start=0.4), lambda s, t: -(torch.softmax(0.6 * s.detach() + 0.4 * t, -1) * s).sum(-1)),
        (
            EntropyAware(),
            lambda s, t: (w := -(t.exp() * t).sum(-1) / math.log(VOCAB)) * kl(t, s) + (1 - w) * kl(s, t),
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_direct_loss_over_the_whole_vocabulary_is_the_dense_one(folder, teacher, objective, loss):
    samples = [scored(teacher, [3, 4], [5, 6, 7]), scored(teacher, [8], [9, 10])]
    got, record = gradients(folder, samples, objective)
    wanted = reference(folder, samples, lambda s, sample: loss(s, teacher_dense(teacher, sample)).sum())
    same(got, wanted)
    with torch.no_grad():
        student = Student.load(str(folder), "cpu")
        value = sum(loss(dense(student, sample), teacher_dense(teacher, sample)).sum() for sample in samples) / 5
    assert record["loss"] == pytest.approx(float(value), rel=1e-4)


def test_kd_is_the_classical_loss(folder, teacher):
    sample = scored(teacher, [3, 4], [5, 6, 7])
    got, _ = gradients(folder, [sample], KD())
    labels = torch.zeros(3, dtype=torch.long)
    same(got, reference(folder, [sample], lambda s, x: 3 * KDLoss()(s, teacher_dense(teacher, x), labels + 5)))


def test_a_narrow_list_costs_the_bucket_what_lies_outside_it(folder, teacher):
    def bucket(s, sample):
        rows = torch.tensor(sample.teacher.ids.astype(np.int64))
        t = torch.tensor(sample.teacher.logp).double()
        s_k = s.gather(1, rows)
        t = torch.cat([t, torch.log1p(-t.exp().sum(1, keepdim=True))], 1)
        s_k = torch.cat([s_k, torch.log1p(-s_k.exp().sum(1, keepdim=True))], 1)
        return kl(t, s_k).sum()

    sample = scored(teacher, [3, 4], [5, 6, 7], k=8)
    same(gradients(folder, [sample], ForwardKL())[0], reference(folder, [sample], bucket))


def test_eopd_adds_the_forward_kl_only_where_the_teacher_is_certainly_unsure(folder, teacher):
    sample = scored(teacher, [3, 4], [5, 6, 7], behavior=[-5.6, -5.8, -9.0])
    entropy = -(teacher_dense(teacher, sample).exp() * teacher_dense(teacher, sample)).sum(-1)
    tau = float(entropy.median())

    def paper(s, sample):
        t, y = teacher_dense(teacher, sample), torch.tensor(sample.core.completion_ids.astype(np.int64))[:, None]
        own, theirs = s.gather(1, y)[:, 0], t.gather(1, y)[:, 0]
        weight = (own.detach() - torch.tensor(sample.behavior.logp).double()).exp().clamp(max=2.0)
        top, ids = t.topk(16)
        cover = kl(torch.log_softmax(top, -1), s.gather(1, ids))
        return (-(weight * (theirs - own.detach()) * own) + (entropy >= tau - 1e-6) * cover).sum()

    got, record = gradients(folder, [sample], EOPD(tau=tau - 1e-4))
    same(got, reference(folder, [sample], paper))
    assert record["gate_fraction"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("dual", [None, 1.5])
def test_ppo_clips_the_ratio_inside_the_graph(folder, teacher, dual):
    sample = scored(teacher, [3, 4], [5, 6, 7, 8], behavior=[-5.7, -9.0, -4.0, -5.6])

    def ppo(s, sample):
        y = torch.tensor(sample.core.completion_ids.astype(np.int64))[:, None]
        own, t = s.gather(1, y)[:, 0], torch.tensor(sample.teacher_logp).double()
        a = t - own.detach()
        r = (own - torch.tensor(sample.behavior.logp).double()).exp()
        loss = torch.maximum(-a * r, -a * r.clamp(0.8, 1.2))
        return (loss if dual is None else torch.where(a < 0, torch.minimum(loss, -a * dual), loss)).sum()

    importance = ImportanceSampling(kind="ppo", clip=0.2, dual_clip=dual)
    got, record = gradients(folder, [sample], ScalarKL(), importance=importance)
    same(got, reference(folder, [sample], ppo))
    assert 0 < record["clip_fraction"] < 1


@pytest.mark.parametrize("beta", [None, 0.5], ids=["scalar_kl", "gjs"])
def test_the_value_baseline_is_the_mean_advantage_of_the_position(folder, teacher, beta):
    """Over the whole vocabulary the baseline is E_y[A] exactly; what is subtracted depends on no sampled token."""
    sample = scored(teacher, [3, 4], [5, 6, 7])
    objective = ScalarKL(baseline="value") if beta is None else GJS(beta=beta, baseline="value")

    def centred(s, sample):
        y = torch.tensor(sample.core.completion_ids.astype(np.int64))[:, None]
        t = teacher_dense(teacher, sample)
        d = s.detach()
        a = t - d if beta is None else (1 - beta) * torch.log(beta * (t - d).exp() + 1 - beta)
        mean = (d.exp() * a).sum(-1)
        return -((a.gather(1, y)[:, 0] - mean) * s.gather(1, y)[:, 0]).sum()

    got, _ = gradients(folder, [sample], objective, importance=ImportanceSampling(kind="none"))
    same(got, reference(folder, [sample], centred))


def test_the_baseline_takes_the_teachers_stored_tail():
    ids, actual = torch.tensor([[1, 2]]), torch.tensor([3])
    full = torch.tensor([[0.6, 0.4]]).log()  # rounded until nothing is left over; a hundredth was
    rows = SparseTeacher(ids, full, torch.tensor([0.01]).log(), actual, torch.tensor([-6.0]))
    student = torch.tensor([[0.5, 0.3]]).log()
    expected = -(0.5 * math.log(0.5 / 0.6) + 0.3 * math.log(0.3 / 0.4) + 0.2 * math.log(0.2 / 0.01))
    assert mean_advantage(student, rows, 1.0) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("kind", ["scalar_kl", "topk_pg"])
def test_gamma_discounts_the_divergences_that_follow_never_the_advantages(folder, teacher, kind):
    sample = scored(teacher, [3, 4], [5, 6, 7])
    make = ScalarKL if kind == "scalar_kl" else lambda **more: TopKPolicyGradient(beta=1.0, **more)

    def following(s, sample):
        y = torch.tensor(sample.core.completion_ids.astype(np.int64))[:, None]
        d = kl(s.detach(), teacher_dense(teacher, sample))
        future = torch.stack([-(0.5 * d[1] + 0.25 * d[2]), -0.5 * d[2], torch.zeros(())])
        return -(future * s.gather(1, y)[:, 0]).sum()

    none = ImportanceSampling(kind="none")
    with_gamma, _ = gradients(folder, [sample], make(gamma=0.5), importance=none)
    without, _ = gradients(folder, [sample], make(), importance=none)
    difference = {name: with_gamma[name] - without[name] for name in with_gamma}
    same(difference, reference(folder, [sample], following), atol=2e-5)
    if kind == "scalar_kl":
        same(gradients(folder, [sample], make(gamma=0.5, advantage="state"), importance=none)[0], difference, atol=2e-5)


def test_at_gamma_a_hole_masks_what_came_before_it(folder):
    lists = [[(5, -0.5), (6, -2.0)]] * 4
    sample = topk_sample([3], [5, 6, 9, 5], lists, [-0.5, -2.0, np.nan, -0.5], [-1.0] * 4)
    _, plain = gradients(folder, [sample], ScalarKL())
    _, record = gradients(folder, [sample], ScalarKL(gamma=0.9))
    assert (plain["tokens"], record["tokens"]) == (3, 1)


def test_the_advantage_clip_bounds_each_token(folder, teacher):
    sample = scored(teacher, [3, 4], [5, 6, 7])
    _, free = gradients(folder, [sample], ScalarKL())
    _, bound = gradients(folder, [sample], ScalarKL(advantage_clip=0.01))
    assert free["advantage_abs_mean"] > 0.01
    _, plain = gradients(folder, [sample], ScalarKL(), importance=ImportanceSampling(kind="none"))
    assert plain["effective_coefficient"] == pytest.approx(1.0, rel=1e-5)
    assert bound["advantage_abs_mean"] == pytest.approx(0.01)
    assert bound["effective_coefficient"] < free["effective_coefficient"]


@pytest.mark.parametrize("objective", ALL, ids=lambda objective: objective.kind)
def test_micro_batches_change_no_objective(folder, teacher, objective):
    samples = [scored(teacher, [3] * (1 + i), list(range(5, 8 + i)), k=6) for i in range(4)]
    whole, one = gradients(folder, samples, objective)
    parts, many = gradients(folder, samples, objective, micro_batch_tokens=10)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-6)  # float32 sums in another order
    for name in ("effective_coefficient", "kl_k1", "ess", "entropy_lo"):
        assert many[name] == pytest.approx(one[name], rel=1e-4)
    told = RUN_LOG.read_text(encoding="utf-8")
    assert [name for name in many if f"`{name}`" not in told] == []
    assert "grad_noise" in many
    assert "grad_noise" not in one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective": {"kind": "topk_pg"}, "learner": {"importance": {"kind": "ppo"}}},
            "which has no ratio",
        ),
        ({"objective": {"kind": "fkl"}, "learner": {"importance": {"kind": "ppo"}}}, "ppo clips the ratios"),
        ({"objective": {"kind": "gjs", "advantage": "state"}}, "state-only advantage at gamma 0"),
        ({"objective": {"kind": "taid", "t_start": 0.9, "t_end": 0.5}}, "up to t_end"),
        ({"objective": {"kind": "topk_pg"}, "data_loss": "objective"}, "do not have"),
        ({"objective": {"kind": "sft"}, "on_policy_fraction": 0.5}, "completions from the data only"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused_with_the_reason(settings, message):
    with pytest.raises(ValidationError, match=message):
        EngineConfig.model_validate(settings)


def test_the_learner_refuses_the_same(folder):
    student, config = Student.load(str(folder), "cpu"), LearnerConfig(importance=ImportanceSampling(kind="ppo"))
    with pytest.raises(ConfigError, match="ppo clips"):
        Learner(student, config, TopKPolicyGradient())


@pytest.mark.parametrize("objective", [ForwardKL(), TAID(), ScalarKL(baseline="value"), GJS(gamma=0.5)], ids=str)
def test_what_looks_at_a_list_refuses_samples_without_one(folder, objective):
    with pytest.raises(ConfigError, match="needs the teacher's top-K rows"):
        gradients(folder, [scalar_sample([3], [5], [-1.0], [-1.0])], objective)


def test_direct_losses_need_no_behaviour_logprob_and_no_realised_teacher_logprob(folder):
    sample = topk_sample([3], [5, 9], [[(5, -0.5), (6, -2.0)]] * 2, [-0.5, np.nan], [np.nan, np.nan])
    _, record = gradients(folder, [sample], ForwardKL())
    assert record["tokens"] == 2
    assert math.isfinite(record["effective_coefficient"])
    assert not {"ess", "kl_k1"} & record.keys()  # nothing was sampled: no ratio, and no estimate of a KL


@pytest.mark.parametrize(
    "objective", [ReverseKL(), DirectGJS(beta=1.0), ScalarKL(baseline="value", gamma=0.5)], ids=str
)
def test_a_listed_id_of_probability_zero_joins_the_tail_at_reverse_kl(folder, objective):
    lists = [[(5, -0.5), (6, -2.0), (7, -np.inf)]] * 2
    got, record = gradients(folder, [topk_sample([3], [5, 6], lists, [-0.5, -2.0], [-1.0, -1.0])], objective)
    assert math.isfinite(record["loss"])
    assert all(torch.isfinite(value).all() for value in got.values())


def test_sft_refuses_scored_samples(folder):
    with pytest.raises(ConfigError, match="data's completions"):
        gradients(folder, [scalar_sample([3], [5], [-1.0], [-1.0])], SFT())


def test_an_objective_of_ones_own_is_a_function_of_the_view(folder, teacher):
    sample = scored(teacher, [3, 4], [5, 6, 7])

    def likelihood(view):
        return -view.logp_new

    got, record = gradients(folder, [sample], likelihood)
    same(
        got,
        reference(
            folder,
            [sample],
            lambda s, x: -s.gather(1, torch.tensor(x.core.completion_ids.astype(np.int64))[:, None]).sum(),
        ),
    )
    assert record["tokens"] == 3
    with pytest.raises(ConfigError, match="one loss per token"):
        gradients(folder, [sample], lambda view: view.logp_new.sum())


@pytest.mark.parametrize("objective", [*ALL, SFT()], ids=lambda objective: objective.kind)
def test_a_list_is_needed_where_the_objective_reads_one(objective):
    alone = isinstance(objective, ScalarKL | GJS | SFT)
    assert (objective.needs_list, objective.count_entries(20)) == (not alone, 1 if alone else 21)


@pytest.mark.parametrize("kind", [ScalarKL, GJS])
@pytest.mark.parametrize("settings", [{"baseline": "value"}, {"gamma": 0.5}], ids=str)
def test_a_baseline_and_a_return_need_the_list_that_the_sampled_token_does_not(kind, settings):
    assert (kind(**settings).needs_list, kind(**settings).count_entries(20)) == (True, 21)


def test_every_kind_but_sft_has_a_loss():
    kinds = {objective.kind for objective in ALL}
    assert kinds == set(LOSSES)
    union = get_args(get_args(Objective)[0])
    assert {member.model_fields["kind"].default for member in union} == kinds | {"sft", "custom"}
