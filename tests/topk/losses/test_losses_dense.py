"""The dense divergence: its value, the invariants of the maths, its gradient, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.topk.every_loss import BETAS, h2, inner, jsd, pair, pairs, seeds, slow, teacher_rows
from topkd.topk import gjs, shared_support_gjs
from topkd.topk.errors import ConfigError
from topkd.topk.losses import (
    generalized_jsd_loss,
    sparse_divergence_loss,
)
from topkd.topk.losses.divergence import divergence, divergence_terms


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", [(1, 2), (5, 3), (3, 4, 17), (2, 1, 129)])
def test_the_loss_is_the_mean_of_the_slow_divergence(beta: float, shape: tuple[int, ...]) -> None:
    student, teacher = pair(1, shape)
    rows = zip(teacher.reshape(-1, shape[-1]), student.reshape(-1, shape[-1]), strict=True)
    wanted = np.mean([slow(t, s, beta) for t, s in rows])
    assert jsd(student, teacher, beta).item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_numpy_and_torch_give_the_same_divergence(beta: float) -> None:
    student, teacher = (torch.log_softmax(x.detach(), -1) for x in pair(2))
    twin = gjs(teacher.numpy(), student.numpy(), beta)
    np.testing.assert_allclose(divergence(teacher, student, beta).numpy(), twin, rtol=1e-10, atol=1e-13)
    ids = teacher.topk(3).indices
    t, s = teacher.gather(-1, ids), student.gather(-1, ids)
    for tail in ("bucket", "renormalise"):
        ours = sparse_divergence_loss(student, teacher_rows(teacher, 3), beta=beta, tail=tail, reduction="none")
        twin = shared_support_gjs(t.numpy(), s.numpy(), beta, tail=tail)
        np.testing.assert_allclose(ours.numpy(), twin, rtol=1e-8, atol=1e-12)


@pairs
@given(seeds, inner)
def test_gjs_lies_between_zero_and_the_binary_entropy(seed: int, beta: float) -> None:
    student, teacher = pair(seed, scale=6.0)
    value = jsd(student, teacher, beta, reduction="none")
    assert (value >= 0).all()
    assert (value <= h2(beta) + 1e-9).all()
    terms = divergence_terms(torch.log_softmax(teacher, -1), torch.log_softmax(student, -1), beta)
    assert (terms >= -1e-12).all()


@pairs
@given(seeds, st.sampled_from(BETAS))
def test_identical_sides_give_zero_and_different_ones_do_not(seed: int, beta: float) -> None:
    student, teacher = pair(seed)
    assert jsd(student, student.detach() + 3.0, beta).item() == pytest.approx(0.0, abs=1e-12)
    assert (jsd(student, teacher, beta, reduction="none") > 1e-6).all()


@pairs
@given(seeds, inner | st.sampled_from([0.0, 1.0]))
def test_swapping_the_sides_swaps_the_weight(seed: int, beta: float) -> None:
    student, teacher = pair(seed)
    swapped = jsd(teacher, student.detach(), 1 - beta)
    assert jsd(student, teacher, beta).item() == pytest.approx(swapped.item(), rel=1e-9, abs=1e-12)


@pairs
@given(seeds, st.sampled_from(BETAS), st.floats(0.3, 4))
def test_order_shift_and_temperature_do_what_they_must(seed: int, beta: float, temperature: float) -> None:
    student, teacher = pair(seed)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    value = jsd(student, teacher, beta, temperature=temperature).item()
    assert jsd(student[..., order], teacher[..., order], beta, temperature=temperature).item() == pytest.approx(value)
    assert jsd(student + 5.0, teacher - 3.0, beta, temperature=temperature).item() == pytest.approx(value)
    assert jsd(student / temperature, teacher / temperature, beta).item() == pytest.approx(value)
    assert jsd(student, teacher, beta, temperature=1e6).item() == pytest.approx(0.0, abs=1e-9)


@pairs
@given(seeds, st.sampled_from(BETAS))
def test_the_tail_divergence_grows_with_k_up_to_the_dense_one(seed: int, beta: float) -> None:
    student, teacher = pair(seed, (4, 9))
    dense = jsd(student, teacher, beta, reduction="none")
    last = torch.zeros_like(dense)
    for k in range(1, 9):
        bucket = sparse_divergence_loss(student, teacher_rows(teacher, k), beta=beta, reduction="none")
        assert (bucket >= last - 1e-7).all()
        assert (bucket <= dense + 1e-7).all()
        same = jsd(student, teacher, beta, top_k=k, tail="bucket", reduction="none")
        torch.testing.assert_close(bucket, same, atol=1e-7, rtol=1e-6)
        last = bucket
    torch.testing.assert_close(jsd(student, teacher, beta, top_k=99, tail="bucket", reduction="none"), dense)
    torch.testing.assert_close(jsd(student, teacher, beta, top_k=9, reduction="none"), dense)


def test_disjoint_supports_give_the_binary_entropy_with_finite_gradients() -> None:
    inf = math.inf
    student = torch.tensor([[0.0, 1.0, -inf, -inf]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-inf, -inf, 2.0, 0.0]], dtype=torch.float64)
    for beta in (0.2, 0.5, 0.7):
        loss = jsd(student, teacher, beta)
        assert loss.item() == pytest.approx(h2(beta))
        assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()
    for beta in (0.0, 1.0):
        assert jsd(student, teacher, beta).item() == inf


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_the_closed_form_and_sums_to_zero(beta: float) -> None:
    student, teacher = pair(3, (5, 8))
    (gradient,) = torch.autograd.grad(jsd(student, teacher, beta, reduction="sum"), student)
    s, t = torch.softmax(student.detach(), -1), torch.softmax(teacher, -1)
    if beta == 0.0:
        wanted = s - t
    else:
        ratio = torch.log(s / (t if beta == 1.0 else beta * t + (1 - beta) * s))
        wanted = (1.0 if beta == 1.0 else 1 - beta) * s * (ratio - (s * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, wanted, atol=1e-13, rtol=1e-10)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(5, dtype=torch.float64), atol=1e-14, rtol=0)


def test_probabilities_in_give_the_same_loss_as_their_logits() -> None:
    student, teacher = pair(12)
    p, q = torch.softmax(student, -1), torch.softmax(teacher, -1)
    assert jsd(p, q, 0.3, logits_are_probs=True).item() == pytest.approx(jsd(student, teacher, 0.3).item())
    zero = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = jsd(zero, torch.tensor([[0.5, 0.5]], dtype=torch.float64), 0.5, logits_are_probs=True)
    assert torch.isfinite(torch.autograd.grad(loss, zero)[0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 1.5}, "beta must lie"),
        ({"beta": math.nan}, "beta must lie"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"tail": "floor", "top_k": 2}, "unknown tail"),
        ({"token_clip": -1.0}, "token_clip must be positive"),
        ({"reduction": "median"}, "unknown reduction"),
        ({"logits_are_probs": True}, "not probabilities"),
        ({"logits_are_probs": True, "temperature": 2.0}, "neither a temperature nor top_k"),
        ({"logits_are_probs": True, "top_k": 2}, "neither a temperature nor top_k"),
        ({"labels": torch.tensor([[0, 1, 1], [1, 0, 1]])}, "only 0 and 1"),
        ({"labels": torch.tensor([[5, -1, 1], [1, 0, 1]])}, "negative but not -100"),
        ({"labels": torch.ones(2, 3)}, "labels must be integers"),
        ({"labels": torch.ones(2, 4, dtype=torch.long)}, "differ in shape"),
        ({"teacher_logits": torch.zeros(2, 3, 9)}, "differ in shape"),
        ({"num_tokens": 4, "reduction": "sum"}, "num_tokens has no meaning"),
        ({"student_logits": torch.zeros(2, 3, 7, dtype=torch.long)}, "floating-point"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(change: dict[str, object], message: str) -> None:
    student, teacher = pair(20)
    with pytest.raises(ConfigError, match=message):
        generalized_jsd_loss(**({"student_logits": student, "teacher_logits": teacher} | change))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_token_whose_divergence_rounds_to_zero_keeps_its_gradient(beta: float) -> None:
    g = torch.Generator().manual_seed(11)
    student = torch.randn(300, 30, generator=g)
    teacher = student + 1e-4 * torch.randn(300, 30, generator=g)
    leaves = [x.requires_grad_() for x in (student.clone(), student.double())]
    single, double = (generalized_jsd_loss(x, teacher.to(x.dtype), beta=beta, reduction="none") for x in leaves)
    rounded = single == 0
    assert rounded.sum() > 20
    assert (double > 0).all()
    short, exact = (torch.autograd.grad(loss.sum(), x)[0] for loss, x in zip((single, double), leaves, strict=True))
    torch.testing.assert_close(short[rounded].double(), exact[rounded], rtol=0.02, atol=3e-7)
    assert exact[rounded].abs().amax(-1).min() > 1e-6
