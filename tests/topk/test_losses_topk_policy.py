"""The top-K policy gradient with a sampled tail: unbiased by exact enumeration, masked where nothing is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from topkd.topk import TopK, topk_weights
from topkd.topk.errors import AlignmentError, ConfigError
from topkd.topk.losses import SparseTeacher, topk_policy_gradient_loss
from topkd.topk.losses.divergence import divergence

V = 9
BETAS = [0.0, 0.3, 0.5, 0.9, 1.0]


def pair(seed: int, rows: int = 3, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, rows, V, generator=g, dtype=torch.float64)
    return logits[0], torch.log_softmax(logits[1], -1)


def support(kind: str, student: Tensor, teacher: Tensor, k: int = 3) -> Tensor:
    """[rows, K] ids chosen without looking at the realised token; the union is padded with -1."""
    best_t, best_s = teacher.topk(k).indices, student.topk(k).indices
    if kind == "teacher":
        return best_t
    if kind == "student":
        return best_s
    rows = []
    for a, b in zip(best_t.tolist(), best_s.tolist(), strict=True):
        ids = sorted(set(a) | set(b))
        rows.append(ids + [-1] * (2 * k - len(ids)))
    return torch.tensor(rows)


def sparse(ids: Tensor, teacher: Tensor, y: Tensor) -> SparseTeacher:
    listed = ids >= 0
    logp = torch.where(listed, teacher.gather(-1, ids.clamp(min=0)), -math.inf)
    tail = torch.log1p(-logp.exp().sum(-1))
    return SparseTeacher(ids, logp, tail, y, teacher.gather(-1, y[:, None]).squeeze(-1))


def estimator(logits: Tensor, ids: Tensor, teacher: Tensor, y: Tensor, **kwargs: object) -> Tensor:
    logp = torch.log_softmax(logits, -1)
    at_ids = logp.gather(-1, ids.clamp(min=0))
    chosen = logp.gather(-1, y[:, None]).squeeze(-1)
    return topk_policy_gradient_loss(at_ids, chosen, sparse(ids, teacher, y), **kwargs)


def expectation(logits: Tensor, ids: Tensor, teacher: Tensor, behavior: Tensor, **kwargs: object) -> Tensor:
    """E_{y ~ behaviour} of the estimator's gradient, by enumeration of y in every row (the rows are independent)."""
    total = torch.zeros_like(logits)
    for v in range(V):
        leaf = logits.clone().requires_grad_()
        y = torch.full((logits.shape[0],), v)
        loss = estimator(leaf, ids, teacher, y, behavior_logp=behavior[:, v], cap=None, reduction="sum", **kwargs)
        loss.backward()
        total += behavior[:, v, None].exp() * leaf.grad
    return total


def wanted_gradient(logits: Tensor, ids: Tensor, teacher: Tensor, beta: float, lam: float) -> Tensor:
    leaf = logits.clone().requires_grad_()
    logp = torch.log_softmax(leaf, -1)
    dense = divergence(teacher, logp, beta)
    total = lam * dense.sum()
    for r in range(logits.shape[0]):
        members = [v for v in ids[r].tolist() if v >= 0]
        others = [v for v in range(V) if v not in members]

        def bins(x: Tensor, inside: list[int], outside: list[int]) -> Tensor:
            return torch.cat([x[inside], torch.logsumexp(x[outside], 0)[None]])

        total = total + (1 - lam) * divergence(bins(teacher[r], members, others), bins(logp[r], members, others), beta)
    return torch.autograd.grad(total, leaf)[0]


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


def served(teacher: Tensor, y: list[int], k: int = 3) -> TopK:
    values, ids = teacher.topk(k)
    rows = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    exact = [float(teacher[r, v]) for r, v in enumerate(y)]
    return TopK.from_lists(rows, actual_ids=y, actual_logp=np.array(exact))


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


def test_holes_and_unknown_realised_tokens_are_masked_counted_and_harmless() -> None:
    logits, teacher = pair(8, rows=4)
    y = torch.tensor([0, 1, 2, 3])
    ids = teacher.topk(3).indices
    leaf = logits.clone().requires_grad_()
    rows = sparse(ids, teacher, y)
    hole = rows.logp.clone()
    hole[1] = -math.inf
    pads = ids.clone()
    pads[1] = -1
    unknown = rows.actual_logp.clone()
    unknown[2] = math.nan
    damaged = SparseTeacher(pads, hole, rows.tail_logp, y, unknown)
    logp = torch.log_softmax(leaf, -1)
    at_ids, chosen = logp.gather(-1, ids), logp.gather(-1, y[:, None])[:, 0]
    loss, metrics = topk_policy_gradient_loss(at_ids, chosen, damaged, return_metrics=True)
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    keep = torch.tensor([True, False, False, True])
    wanted = topk_policy_gradient_loss(at_ids[keep], chosen[keep], rows.rows(keep))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-13)
    assert metrics["masked_rows"] == 2
    assert not gradient[1:3].any()
    # without the sampled term the realised token is not needed: only the hole stays out
    keep = torch.tensor([True, False, True, True])
    deterministic = topk_policy_gradient_loss(at_ids, chosen, damaged, lam=0.0)
    wanted = topk_policy_gradient_loss(at_ids[keep], chosen[keep], rows.rows(keep), lam=0.0)
    assert deterministic.item() == pytest.approx(wanted.item(), rel=1e-13)


def test_masked_rows_may_hold_nan_on_every_side() -> None:
    logits, teacher = pair(9, rows=4)
    y = torch.tensor([0, 1, 2, 3])
    ids = teacher.topk(3).indices
    logp = torch.log_softmax(logits, -1)
    at_ids, chosen = logp.gather(-1, ids), logp.gather(-1, y[:, None])[:, 0]
    clean = topk_policy_gradient_loss(at_ids[:3], chosen[:3], sparse(ids, teacher, y).rows(torch.arange(3)))
    rows = sparse(ids, teacher, y)
    at_ids[3], chosen[3], rows.logp[3], rows.tail_logp[3], rows.actual_logp[3] = [math.nan] * 5
    at_ids.requires_grad_()
    mask = torch.tensor([True, True, True, False])
    behavior = chosen.clone()
    loss = topk_policy_gradient_loss(at_ids, chosen, rows, mask, behavior_logp=behavior)
    loss.backward()
    assert loss.item() == pytest.approx(clean.item(), rel=1e-13)
    assert torch.isfinite(at_ids.grad).all()


def test_nothing_valid_is_zero_with_a_graph() -> None:
    logits, teacher = pair(10)
    y = torch.zeros(3, dtype=torch.long)
    leaf = logits.clone().requires_grad_()
    loss = estimator(leaf, teacher.topk(3).indices, teacher, y, mask=torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert not leaf.grad.any()


def test_an_empty_tail_is_gated_and_counted_instead_of_dividing_roundings() -> None:
    teacher = torch.tensor([[math.log(1 - 1e-9), math.log(5e-10), math.log(5e-10)]], dtype=torch.float64)
    student = torch.tensor([[0.2, 0.7, -0.1]], dtype=torch.float64, requires_grad=True)
    ids, y = torch.tensor([[0]]), torch.tensor([2])
    logp = torch.log_softmax(student, -1)
    rows = sparse(ids, teacher, y)
    loss, metrics = topk_policy_gradient_loss(
        logp.gather(-1, ids), logp.gather(-1, y[:, None])[:, 0], rows, lam=1.0, return_metrics=True
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert metrics["gated_rows"] == 1
    s, t = logp[0].exp(), teacher[0].exp()
    g = 0.5 * torch.log((0.5 * t + 0.5 * s) / s)
    onehot = torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(gradient[0], (-(s[0] * g[0]) * (onehot - s)).detach())


def test_at_reverse_kl_a_realised_token_the_teacher_rules_out_is_masked_and_counted() -> None:
    logits, teacher = pair(12)
    teacher[:, 8] = -math.inf
    teacher = torch.log_softmax(teacher, -1)
    y = torch.tensor([8, 8, 1])
    leaf = logits.clone().requires_grad_()
    ids = teacher.topk(3).indices
    loss, metrics = estimator(leaf, ids, teacher, y, beta=1.0, lam=1.0, return_metrics=True)
    loss.backward()
    assert metrics["excluded_tokens"] == 2
    assert torch.isfinite(leaf.grad).all()
    below, metrics = estimator(leaf, ids, teacher, y, beta=0.9, lam=1.0, return_metrics=True)
    assert metrics["excluded_tokens"] == 0
    assert math.isfinite(below.item())


def test_a_listed_exact_zero_belongs_to_the_tail_at_reverse_kl() -> None:
    logits, teacher = pair(13)
    teacher[:, 0] = -math.inf
    teacher = torch.log_softmax(teacher, -1)
    rest = teacher.topk(3).indices
    with_zero = torch.cat([rest, torch.zeros(3, 1, dtype=torch.long)], -1)
    y = torch.tensor([5, 6, 7])
    a = estimator(logits, rest, teacher, y, beta=1.0, lam=0.5)
    b = estimator(logits, with_zero, teacher, y, beta=1.0, lam=0.5)
    assert a.item() == pytest.approx(b.item(), rel=1e-12)


def test_an_id_the_student_excludes_has_no_nan() -> None:
    logits, teacher = pair(14)
    ids = teacher.topk(3).indices
    logits.scatter_(-1, ids[:, :1], -math.inf)
    leaf = logits.clone().requires_grad_()
    for beta in BETAS:
        leaf.grad = None
        estimator(leaf, ids, teacher, torch.tensor([ids[r, 1] for r in range(3)]), beta=beta).backward()
        assert torch.isfinite(leaf.grad).all()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_students_stay_close_to_float64(dtype: torch.dtype) -> None:
    logits, teacher = pair(18)
    ids, y = teacher.topk(3).indices, torch.tensor([0, 4, 8])
    logp = torch.log_softmax(logits, -1).to(dtype)
    at_ids, chosen = logp.gather(-1, ids), logp.gather(-1, y[:, None])[:, 0]
    low = topk_policy_gradient_loss(at_ids, chosen, sparse(ids, teacher, y))
    exact = topk_policy_gradient_loss(at_ids.double(), chosen.double(), sparse(ids, teacher, y))
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(exact.item(), rel=1e-5)


def test_misaligned_or_impossible_arguments_are_refused() -> None:
    logits, teacher = pair(19)
    ids, y = teacher.topk(3).indices, torch.tensor([0, 1, 2])
    rows = sparse(ids, teacher, y)
    logp = torch.log_softmax(logits, -1)
    at_ids, chosen = logp.gather(-1, ids), logp.gather(-1, y[:, None])[:, 0]
    with pytest.raises(AlignmentError, match="different numbers of rows"):
        topk_policy_gradient_loss(at_ids[:2], chosen[:2], rows)
    with pytest.raises(ConfigError, match="differ in K"):
        topk_policy_gradient_loss(at_ids[:, :2], chosen, rows)
    with pytest.raises(ConfigError, match="lam must lie"):
        topk_policy_gradient_loss(at_ids, chosen, rows, lam=1.5)
    with pytest.raises(ConfigError, match="beta must lie"):
        topk_policy_gradient_loss(at_ids, chosen, rows, beta=-0.1)
    with pytest.raises(ConfigError, match="behavior_logp is not finite"):
        topk_policy_gradient_loss(at_ids, chosen, rows, behavior_logp=chosen * math.nan)
    with pytest.raises(ConfigError, match="must be boolean"):
        topk_policy_gradient_loss(at_ids, chosen, rows, torch.ones(3))
