"""The top-K policy gradient with a sampled tail: unbiased by exact enumeration, one loss in every form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.topk.enumeration import BETAS, V, estimator, expectation, pair, served, support, wanted_gradient
from topkd.topk import topk_weights
from topkd.topk.losses import topk_policy_gradient_loss
from topkd.topk.losses.divergence import divergence


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("kind", ["teacher", "student", "union"])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", BETAS)
def test_the_expected_gradient_is_that_of_the_mixed_divergence(
    beta: float, lam: float, kind: str, on_policy: bool
) -> None:
    logits, teacher = pair(3)
    behavior = torch.log_softmax(logits if on_policy else pair(11)[0], -1)
    ids = support(kind, torch.log_softmax(logits, -1), teacher)
    got = expectation(logits, ids, teacher, behavior, beta=beta, lam=lam)
    torch.testing.assert_close(got, wanted_gradient(logits, ids, teacher, beta, lam), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_a_list_of_the_whole_vocabulary_gives_the_dense_gradient(beta: float) -> None:
    logits, teacher = pair(4)
    leaf = logits.clone().requires_grad_()
    ids = teacher.topk(V).indices
    y = torch.zeros(3, dtype=torch.long)
    loss, metrics = estimator(leaf, ids, teacher, y, beta=beta, lam=1.0, reduction="sum", return_metrics=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, wanted_gradient(logits, ids, teacher, beta, 1.0), atol=1e-12, rtol=1e-9)
    assert metrics["gated_rows"] == 3
    assert metrics["in_support"] == 1.0


def test_a_support_that_holds_y_because_y_was_sampled_is_biased_and_k_takes_it_out() -> None:
    logits, teacher = pair(5)
    ids = support("teacher", torch.log_softmax(logits, -1), teacher)
    behavior = torch.log_softmax(logits, -1)
    wanted = wanted_gradient(logits, ids, teacher, 0.5, 1.0)
    raw, cut = torch.zeros_like(logits), torch.zeros_like(logits)
    for v in range(V):
        y = torch.full((3,), v)
        listed = (ids == v).any(-1, keepdim=True)
        wide = torch.cat([ids, torch.where(listed, -1, v)], -1)  # the server's extra entry, rank K + 1
        for total, k in ((raw, None), (cut, 3)):
            leaf = logits.clone().requires_grad_()
            estimator(leaf, wide, teacher, y, beta=0.5, lam=1.0, reduction="sum", k=k).backward()
            total.add_(behavior[:, v, None].exp() * leaf.grad)
    torch.testing.assert_close(cut, wanted, atol=1e-12, rtol=1e-12)
    assert (raw - wanted).abs().max() > 1e-3


def test_a_topk_gives_the_same_loss_as_float64_tensors_up_to_its_own_float32() -> None:
    logits, teacher = pair(6)
    y = [0, 4, 8]
    topk = served(teacher, y)
    logp = torch.log_softmax(logits, -1)
    at_ids, chosen = logp.gather(-1, torch.tensor(topk.ids).long()), logp.gather(-1, torch.tensor(y)[:, None])[:, 0]
    exact = estimator(logits, torch.tensor(topk.ids).long(), teacher, torch.tensor(y))
    assert topk_policy_gradient_loss(at_ids, chosen, topk).item() == pytest.approx(exact.item(), rel=1e-5)
    parts = [topk.slice(slice(0, 1)), topk.slice(slice(1, 3))]
    assert topk_policy_gradient_loss(at_ids, chosen, parts).item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", BETAS)
def test_numpy_and_torch_give_the_same_weights(beta: float, lam: float) -> None:
    logits, teacher = pair(21, rows=6)
    y = [0, 1, 2, 3, 4, 5]
    topk = served(teacher, y)
    logp = torch.log_softmax(logits, -1)
    at_ids = logp.gather(-1, torch.tensor(topk.ids).long()).requires_grad_()
    chosen = logp.gather(-1, torch.tensor(y)[:, None])[:, 0].requires_grad_()
    ratio = torch.linspace(0.3, 1.8, 6, dtype=torch.float64)
    loss = topk_policy_gradient_loss(
        at_ids, chosen, topk, beta=beta, lam=lam, behavior_logp=chosen.detach() - ratio.log(), reduction="sum"
    )
    loss.backward()
    w_ids, w_actual = topk_weights(
        topk, at_ids.detach().numpy(), chosen.detach().numpy(), beta=beta, lam=lam, is_weight=ratio.numpy()
    )
    np.testing.assert_allclose(-at_ids.grad.numpy(), w_ids, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(-chosen.grad.numpy(), w_actual, rtol=1e-5, atol=1e-7)


def test_padded_sequences_of_a_batch_give_the_flat_loss() -> None:
    logits, teacher = pair(7, rows=5)
    y = [1, 2, 3, 4, 5]
    topk = served(teacher, y)
    logp = torch.log_softmax(logits, -1)
    at_ids, chosen = logp.gather(-1, torch.tensor(topk.ids).long()), logp.gather(-1, torch.tensor(y)[:, None])[:, 0]
    flat = topk_policy_gradient_loss(at_ids, chosen, topk)
    nan = torch.full((1,), math.nan, dtype=torch.float64)
    wide_ids = torch.stack([at_ids[:3], torch.cat([at_ids[3:], nan.expand(1, 3)])])
    wide_actual = torch.stack([chosen[:3], torch.cat([chosen[3:], nan])])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    parts = [topk.slice(slice(0, 3)), topk.slice(slice(3, 5))]
    padded = topk_policy_gradient_loss(wide_ids, wide_actual, parts, mask)
    assert padded.item() == pytest.approx(flat.item(), rel=1e-12)


def test_the_cap_bounds_only_the_sampled_term() -> None:
    logits, teacher = pair(15)
    ids = teacher.topk(3).indices
    y = torch.tensor([next(v for v in range(V) if v not in row) for row in ids.tolist()])
    chosen = torch.log_softmax(logits, -1).gather(-1, y[:, None])[:, 0]
    base = estimator(logits, ids, teacher, y, lam=0.0).item()
    on_policy = estimator(logits, ids, teacher, y, lam=1.0).item() - base
    for offset, cap, ratio in ((-5.0, 2.0, 2.0), (-0.1, 2.0, math.exp(0.1)), (-3.0, None, math.exp(3.0))):
        loss = estimator(logits, ids, teacher, y, lam=1.0, behavior_logp=chosen + offset, cap=cap).item()
        assert loss - base == pytest.approx(ratio * on_policy, rel=1e-9)


def test_the_mean_is_over_valid_rows_and_accumulates_by_global_tokens() -> None:
    logits, teacher = pair(16, rows=6)
    ids, y = teacher.topk(3).indices, torch.tensor([0, 1, 2, 3, 4, 5])
    whole = estimator(logits, ids, teacher, y).item()
    total = estimator(logits, ids, teacher, y, reduction="sum").item()
    halves = [
        estimator(logits[i : i + 3], ids[i : i + 3], teacher[i : i + 3], y[i : i + 3], num_tokens=6).item()
        for i in (0, 3)
    ]
    assert total == pytest.approx(6 * whole)
    assert sum(halves) == pytest.approx(whole)


def test_metrics_say_what_the_rows_looked_like() -> None:
    logits, teacher = pair(17)
    ids = teacher.topk(3).indices
    y = torch.stack([ids[0, 0], ids[1, 2], torch.tensor(next(v for v in range(V) if v not in ids[2].tolist()))])
    _, metrics = estimator(logits, ids, teacher, y, return_metrics=True)
    student = torch.log_softmax(logits, -1)
    assert metrics["in_support"] == pytest.approx(2 / 3)
    assert metrics["teacher_tail"] == pytest.approx(1 - teacher.gather(-1, ids).exp().sum(-1).mean().item())
    assert metrics["student_tail"] == pytest.approx(1 - student.gather(-1, ids).exp().sum(-1).mean().item())
    assert 0 < metrics["divergence_bucket"] <= divergence(teacher, student, 0.5).mean().item()
