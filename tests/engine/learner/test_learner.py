"""One step: the right gradient, the right denominator, holes masked, trouble reported."""

import copy
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.pieces import VOCAB, model_folder, scalar_sample, topk_sample
from topkd.engine.config.learner import ImportanceSampling, LearnerConfig
from topkd.engine.config.objectives import GJS, ForwardKL, ScalarKL, TopKPolicyGradient
from topkd.engine.learner.learner import Learner
from topkd.engine.models.student import Student
from topkd.topk.errors import ConfigError, TrainingError

BIG = 1e9  # a clip norm that never clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


def fresh(folder):
    return Student.load(str(folder), "cpu")


def logp_of(student, sample, *, grad=False):
    ids = torch.tensor(sample.core.full_ids.astype(np.int64))[None]
    with torch.set_grad_enabled(grad):
        logp = torch.log_softmax(student.model(input_ids=ids[:, :-1]).logits[0].double(), -1)
    rows = torch.arange(sample.core.prompt_len - 1, ids.shape[1] - 1)
    return logp[rows, ids[0, sample.core.prompt_len :]], logp[rows]


def gradients_of_step(student, samples, objective, **config):
    """The gradient a step used, recovered from one SGD-like look: hook the optimiser instead of trusting it."""
    learner = Learner(student, LearnerConfig(max_grad_norm=BIG, **config), objective)
    seen = {}

    def step(*args, **kwargs):
        seen.update({name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None})

    learner._optimizer.step = step
    record = learner.step(samples)
    return seen, record


@pytest.mark.parametrize("objective", [ScalarKL(), GJS(beta=0.5), GJS(beta=0.0), GJS(beta=1.0)], ids=str)
def test_the_gradient_is_minus_the_mean_of_weighted_advantages(folder, objective):
    student = fresh(folder)
    rng = np.random.default_rng(0)
    samples = [
        scalar_sample([3, 4], [5, 6, 7], -rng.uniform(0.5, 6, 3), -rng.uniform(0.5, 6, 3)),
        scalar_sample([8], [9, 10, 11, 12], -rng.uniform(0.5, 6, 4), -rng.uniform(0.5, 6, 4), [1, 0, 1, 1]),
    ]
    got, record = gradients_of_step(student, samples, objective, importance=ImportanceSampling(cap=2.0))
    student.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        logp, _ = logp_of(student, sample, grad=True)
        s, t = logp.detach().numpy(), sample.teacher_logp.astype(np.float64)
        beta = getattr(objective, "beta", 1.0)
        advantage = (
            t - s if beta == 1.0 else np.expm1(t - s) if beta == 0.0 else 0.5 * np.log(0.5 * np.exp(t - s) + 0.5)
        )
        weight = np.minimum(np.exp(s - sample.behavior.logp), 2.0)
        total = total - (torch.from_numpy(weight * advantage * sample.core.mask) * logp).sum() / 6
    total.backward()
    for name, parameter in student.model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=2e-3, atol=2e-5)
    assert record["tokens"] == 6
    assert record["masked_tokens"] == 0


def test_micro_batches_change_nothing(folder):
    rng = np.random.default_rng(1)
    samples = [
        scalar_sample([3] * (1 + i), list(range(5, 7 + i)), -rng.uniform(0.5, 6, 2 + i), -rng.uniform(0.5, 6, 2 + i))
        for i in range(5)
    ]
    student = fresh(folder)
    whole, _ = gradients_of_step(student, samples, GJS())
    parts, _ = gradients_of_step(copy.deepcopy(fresh(folder)), samples, GJS(), micro_batch_tokens=8)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def test_unknown_teacher_logprobs_are_masked_and_equal_to_a_mask(folder):
    with_hole = scalar_sample([3, 4], [5, 6, 7], [-1.0, np.nan, -2.0], [-1.0, -1.0, -1.0])
    with_mask = scalar_sample([3, 4], [5, 6, 7], [-1.0, -9.0, -2.0], [-1.0, -1.0, -1.0], [1, 0, 1])
    one, record = gradients_of_step(fresh(folder), [with_hole], GJS())
    two, _ = gradients_of_step(fresh(folder), [with_mask], GJS())
    assert record["masked_tokens"] == 1
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_a_token_the_teacher_excludes_is_masked_for_scalar_kl_and_bounded_for_gjs(folder):
    sample = scalar_sample([3, 4], [5, 6], [-np.inf, -1.0], [-1.0, -1.0])
    _, scalar = gradients_of_step(fresh(folder), [sample], ScalarKL())
    _, gjs = gradients_of_step(fresh(folder), [sample], GJS(beta=0.5))
    assert (scalar["tokens"], scalar["masked_tokens"]) == (1, 1)
    assert (gjs["tokens"], gjs["masked_tokens"]) == (2, 0)
    assert np.isfinite(gjs["loss"])
    assert np.isfinite(scalar["loss"])


def test_topk_objective_over_the_whole_vocabulary_gives_the_dense_gradient(folder):
    """With K = V nothing is sampled: the step's gradient is the divergence's own, whatever the completion was."""
    student, teacher = fresh(folder), Student.load(str(model_folder(folder.parent / "other", seed=5)), "cpu")
    sample = scalar_sample([3, 4], [5, 6], [0, 0], [-1.0, -1.0])
    _, dense_t = logp_of(teacher, sample)
    lists = [list(enumerate(row.tolist())) for row in dense_t.float().double()]
    actual = dense_t[[0, 1], [5, 6]].numpy()
    got, _ = gradients_of_step(
        student, [topk_sample([3, 4], [5, 6], lists, actual, [-1.0, -1.0])], TopKPolicyGradient()
    )
    student.model.zero_grad()
    _, s = logp_of(student, sample, grad=True)
    m = torch.logaddexp(s, dense_t) - np.log(2)
    divergence = 0.5 * (dense_t.exp() * (dense_t - m)).sum(-1) + 0.5 * (s.exp() * (s - m)).sum(-1)
    divergence.mean().backward()
    for name, parameter in student.model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=5e-3, atol=5e-6)


def test_the_topk_objective_refuses_scalar_samples(folder):
    with pytest.raises(ConfigError, match="needs the teacher's top-K rows"):
        Learner(fresh(folder), LearnerConfig(), TopKPolicyGradient()).step([scalar_sample([3], [5], [-1.0], [-1.0])])


def test_a_step_without_a_trainable_token_changes_nothing_and_says_so(folder):
    student = fresh(folder)
    before = copy.deepcopy(student.model.state_dict())
    learner = Learner(student, LearnerConfig(lr=1.0), GJS())
    hole = scalar_sample([3, 4], [5], [np.nan], [-1.0])
    record = learner.step([hole])
    assert record["skipped"] == "no trainable token"
    assert all(torch.equal(before[name], value) for name, value in student.model.state_dict().items())
    for _ in range(3):
        learner.step([hole])
    with pytest.raises(TrainingError, match="in a row were skipped"):
        learner.step([hole])


def test_kl_metrics_have_the_sign_of_a_kl(folder):
    student = fresh(folder)
    sample = scalar_sample([3, 4], [5, 6], [0, 0], [-1.0, -1.0])
    logp, _ = logp_of(student, sample)
    worse = scalar_sample([3, 4], [5, 6], logp.numpy() - 0.7, logp.numpy())
    record = Learner(student, LearnerConfig(lr=1e-9), ScalarKL()).step([worse])
    assert record["kl_k1"] == pytest.approx(0.7, abs=1e-4)
    assert record["kl_k3"] == pytest.approx(np.expm1(-0.7) + 0.7, abs=1e-4)
    assert record["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert record["ess"] == pytest.approx(1.0, abs=1e-4)


def test_teacher_ids_past_the_students_vocabulary_join_the_tail(folder):
    inside = [[(5, -0.5), (6, -2.0)], [(7, -0.7), (8, -1.5)]]
    padded = [[(5, -0.5), (VOCAB + 3, -1.6), (6, -2.0)], [(VOCAB + 9, -2.5), (7, -0.7), (8, -1.5)]]
    args = ([3, 4], [5, 9])
    one, _ = gradients_of_step(fresh(folder), [topk_sample(*args, inside, [-0.5, -3], [-1, -1])], TopKPolicyGradient())
    two, _ = gradients_of_step(fresh(folder), [topk_sample(*args, padded, [-0.5, -3], [-1, -1])], TopKPolicyGradient())
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_a_student_whose_logits_are_capped_after_the_head_is_refused(folder):
    student = fresh(folder)
    forward = student.model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 2.0) * 2.0
        return output

    student.model.forward = capped
    with pytest.raises(ConfigError, match="soft-capping or scaling"):
        Student.wrap(student.model, "cpu")


def test_a_row_that_lists_only_ids_the_student_lacks_is_masked_and_leaves_the_mean(folder):
    good, lost = [(5, -0.5), (6, -2.0)], [(VOCAB + 1, -0.1), (VOCAB + 2, -3.0)]
    args = ([3, 4], [5, 9])
    whole = topk_sample(*args, [good, lost], [-0.5, -3.0], [-1.0, -1.0])
    masked = topk_sample(*args, [good, lost], [-0.5, -3.0], [-1.0, -1.0], [1, 0])
    one, record = gradients_of_step(fresh(folder), [whole], TopKPolicyGradient())
    two, _ = gradients_of_step(fresh(folder), [masked], TopKPolicyGradient())
    assert (record["tokens"], record["masked_tokens"]) == (1, 1)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)


def test_unknown_behaviour_logprobs_are_masked_and_counted(folder):
    unknown = topk_sample([3, 4], [5, 9], [[(5, -0.5)], [(9, -0.7)]], [-0.5, -0.7], [-1.0, np.nan])
    for objective in (ScalarKL(), GJS(), TopKPolicyGradient()):
        seen, record = gradients_of_step(fresh(folder), [unknown], objective)
        assert (record["tokens"], record["masked_tokens"]) == (1, 1)
        assert all(torch.isfinite(gradient).all() for gradient in seen.values())


def test_what_the_estimator_gates_and_what_a_kl_leaves_out_is_in_the_record(folder):
    sure = topk_sample([3, 4], [5, 9], [[(5, 0.0)], [(5, -0.5), (6, -2.0)]], [0.0, -np.inf], [-1.0, -1.0])
    _, record = gradients_of_step(fresh(folder), [sure], TopKPolicyGradient())
    assert (record["tokens"], record["gated_rows"], record["teacher_zero_tokens"]) == (2, 1, 1)
    _, halves = gradients_of_step(fresh(folder), [sure, sure], TopKPolicyGradient(), micro_batch_tokens=1)
    assert halves["gated_rows"] == 2
    assert halves["divergence_bucket"] == pytest.approx(record["divergence_bucket"], rel=1e-5)
    assert 0.0 < record["divergence_bucket"] < np.log(2)
    _, scalar = gradients_of_step(fresh(folder), [sure], GJS())
    assert "gated_rows" not in scalar


def test_nothing_is_called_capped_where_no_ratio_is_used(folder):
    far = scalar_sample([3, 4], [5, 6], [-1.0, -1.0], [-30.0, -30.0])
    for kind, share in (("truncated", 1.0), ("none", 0.0)):
        _, record = gradients_of_step(fresh(folder), [far], GJS(), importance=ImportanceSampling(kind=kind))
        assert record["clip_fraction"] == share
    _, record = gradients_of_step(
        fresh(folder), [topk_sample([3, 4], [5], [[(5, -0.5)]], [-0.5], [-30.0])], ForwardKL()
    )
    assert record["ratio_max"] > ImportanceSampling().cap
    assert record["clip_fraction"] == 0.0, "a direct loss weighs nothing by a ratio"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: {key: value for key, value in tensors.items() if "norm" not in key}, r"no weights for .*norm"),
        (lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"][:3]}, r"cannot load"),
        (lambda tensors: None, r"cannot load"),
    ],
    ids=["missing", "mismatched", "torn"],
)
def test_a_model_whose_weights_are_not_all_there_is_refused_and_never_filled_up(folder, tmp_path, spoil, message):
    copied = shutil.copytree(folder, tmp_path / "spoilt")
    (file,) = copied.glob("*.safetensors")
    spoilt = spoil(load_file(file))
    if spoilt is None:
        file.write_bytes(file.read_bytes()[:500])
    else:
        save_file(spoilt, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message) as caught:
        Student.load(str(copied), "cpu")
    assert "\n" not in str(caught.value)


def test_at_reverse_kl_an_excluded_token_keeps_the_lists_own_gradient(folder):
    """t(y) = 0 has no finite advantage: the sampled term is left out, the sum over the list is not."""
    lists = [[(5, -0.4), (6, -2.0)]]
    excluded = topk_sample([3, 4], [9], lists, [-np.inf], [-1.0])
    alone = topk_sample([3, 4], [5], lists, [-0.4], [-1.0])  # y is listed: no tail term either
    one, record = gradients_of_step(fresh(folder), [excluded], TopKPolicyGradient(beta=1.0))
    two, _ = gradients_of_step(fresh(folder), [alone], TopKPolicyGradient(beta=1.0))
    assert (record["tokens"], record["masked_tokens"]) == (1, 0)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
