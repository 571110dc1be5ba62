"""The NumPy and the torch form of one formula give one number."""

import numpy as np
import pytest

from tests.topk import reference
from tests.topk.lists import listed_at, random_logp, topk_of
from topkd.topk import gjs, gjs_advantage, shared_support_gjs, topk_weights

torch = pytest.importorskip("torch")

from topkd.topk.losses import generalized_jsd_loss, sparse_divergence_loss, taid_loss, topk_policy_gradient_loss  # noqa: E402
from topkd.topk.losses.topk_policy import advantage  # noqa: E402

BETAS = (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("beta", BETAS)
def test_dense_divergences_agree(beta: float) -> None:
    rng = np.random.default_rng(0)
    teacher, student = random_logp(rng, 7, 33, scale=4), random_logp(rng, 7, 33, scale=4)
    twin = generalized_jsd_loss(
        torch.from_numpy(student), torch.from_numpy(teacher), beta=beta, reduction="none"
    ).numpy()
    np.testing.assert_allclose(gjs(teacher, student, beta), twin, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_divergences_on_a_teachers_list_agree(beta: float, tail: str) -> None:
    rng = np.random.default_rng(1)
    student = random_logp(rng, 6, 40)
    teacher = topk_of(random_logp(rng, 6, 40), 9)
    at = np.take_along_axis(student, teacher.ids.astype(np.int64), axis=1)
    twin = sparse_divergence_loss(torch.from_numpy(student), teacher, beta=beta, tail=tail, reduction="none").numpy()
    np.testing.assert_allclose(shared_support_gjs(teacher.logp, at, beta, tail), twin, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_advantages_agree(beta: float) -> None:
    difference = np.concatenate([np.linspace(-30, 30, 61), [1e-6, -1e-6]])
    student = np.full(difference.shape, -31.0)
    exact = (student + difference) - student
    twin = advantage(torch.from_numpy(exact), beta).numpy()
    np.testing.assert_allclose(gjs_advantage(student + difference, student, beta), twin, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("support", ["teacher", "student"])
def test_the_losss_gradient_is_minus_the_weights(beta: float, lam: float, support: str) -> None:
    rng = np.random.default_rng(5)
    rows, vocab, k = 12, 30, 6
    t, s = random_logp(rng, rows, vocab), random_logp(rng, rows, vocab)
    ids = np.argsort(-(t if support == "teacher" else s), axis=1)[:, :k]
    actual = rng.integers(0, vocab, rows)
    teacher = listed_at(t, ids, actual)
    at, own = np.take_along_axis(s, teacher.ids.astype(np.int64), axis=1), s[np.arange(rows), actual]
    behavior = own + rng.normal(size=rows) * 0.3
    behavior = np.minimum(behavior, 0.0)
    w_ids, w_actual = topk_weights(teacher, at, own, beta=beta, lam=lam, is_weight=np.exp(own - behavior))
    at_ids, of_actual = (torch.from_numpy(x).requires_grad_() for x in (at, own))
    loss = topk_policy_gradient_loss(
        at_ids,
        of_actual,
        teacher,
        beta=beta,
        lam=lam,
        behavior_logp=torch.from_numpy(behavior),
        cap=None,
        reduction="sum",
    )
    loss.backward()
    np.testing.assert_allclose(-at_ids.grad.numpy(), w_ids, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(-of_actual.grad.numpy(), w_actual, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("t", [0.1, 0.3, 0.9])
def test_taid_moves_its_target_from_the_student_towards_the_teacher_by_t(t: float) -> None:
    rng = np.random.default_rng(6)
    student, teacher = rng.normal(size=(4, 9)) * 3, rng.normal(size=(4, 9)) * 3
    logits = torch.from_numpy(student).requires_grad_()
    loss = taid_loss(logits, torch.from_numpy(teacher), t=t)
    loss.backward()
    target = [reference.softmax(((1 - t) * s + t * z).tolist()) for s, z in zip(student, teacher, strict=True)]
    own = np.array([reference.softmax(row.tolist()) for row in student])
    assert loss.item() == pytest.approx(-(np.array(target) * np.log(own)).sum(axis=1).mean(), rel=1e-10)
    np.testing.assert_allclose(logits.grad.numpy(), (own - target) / 4, rtol=1e-9, atol=1e-12)
