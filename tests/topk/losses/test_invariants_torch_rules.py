"""The invariants I12 .. I26 of the maths on the torch losses, over random logits in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.topk.random_logits import EPS, EXAMPLES, LOSSES, betas, interior, listed, names, pairs, value_and_grad
from topkd.topk.losses import (
    KDLoss,
    TAIDScheduler,
    entropy_aware_opd_loss,
    fused_divergence_loss,
    generalized_jsd_loss,
    importance_sampling_loss,
    ppo_clip_loss,
    reinforce_loss,
    sparse_divergence_loss,
    taid_loss,
    teacher_entropy,
)
from topkd.topk.losses.topk_policy import advantage


@EXAMPLES
@given(st.floats(-40, 0), st.floats(-40, 0), betas)
def test_i12_i13_i14_the_advantage_is_bounded_zero_at_equality_and_signed(lt: float, ls: float, beta: float) -> None:
    both = torch.tensor([lt - ls, 0.0], dtype=torch.float64)
    value, none = advantage(both, beta).tolist()
    if beta < 1:
        assert value >= ((1 - beta) * math.log1p(-beta) if beta > 0 else -1.0) - EPS
    assert none == pytest.approx(0.0, abs=1e-15)
    if abs(lt - ls) > 1e-6:
        assert math.copysign(1, value) == math.copysign(1, lt - ls)


@EXAMPLES
@given(pairs(), interior)
def test_i15_i16_disjoint_sides_reach_the_bound_and_k_equal_to_v_is_dense(
    pair: tuple[Tensor, Tensor], beta: float
) -> None:
    student, teacher = pair
    none = torch.full_like(student, -math.inf)
    apart = generalized_jsd_loss(torch.cat([student, none], -1), torch.cat([none, teacher], -1), beta=beta)
    assert apart.item() == pytest.approx(-beta * math.log(beta) - (1 - beta) * math.log1p(-beta), abs=EPS)
    vocab = student.shape[1]
    dense, exact = value_and_grad(lambda s: generalized_jsd_loss(s, teacher, beta=beta), student)
    for options in ({"top_k": vocab}, {"top_k": vocab + 3, "tail": "bucket"}):
        assert generalized_jsd_loss(student, teacher, beta=beta, **options).item() == pytest.approx(dense, abs=1e-12)
    for tail in ("bucket", "renormalise"):
        got, gradient = value_and_grad(
            lambda s, tail=tail: sparse_divergence_loss(s, listed(teacher, vocab), beta=beta, tail=tail), student
        )
        assert got == pytest.approx(dense, abs=1e-6)
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-6)
    fused = fused_divergence_loss(student, torch.eye(vocab, dtype=torch.float64), listed(teacher, vocab), beta=beta)
    assert fused.item() == pytest.approx(dense, abs=1e-6)


@EXAMPLES
@given(pairs(), betas, st.integers(0, 2))
def test_i17_a_hole_is_masked_and_a_dead_row_is_nan(pair: tuple[Tensor, Tensor], beta: float, at: int) -> None:
    student, teacher = pair[0], pair[1].clone()
    teacher[at] = math.nan  # listed() makes it a hole
    kept = [row for row in range(3) if row != at]
    for loss in (
        lambda s, t: sparse_divergence_loss(s, t, beta=beta),
        lambda s, t: fused_divergence_loss(s, torch.eye(s.shape[1], dtype=s.dtype), t, beta=beta),
    ):
        rows = listed(teacher, 2)
        value, gradient = value_and_grad(lambda s, loss=loss, rows=rows: loss(s, rows), student)
        assert value == pytest.approx(loss(student[kept], rows.rows(torch.tensor(kept))).item(), rel=1e-12)
        assert not gradient[at].any()
    teacher[at] = -math.inf
    values = generalized_jsd_loss(student, teacher, beta=beta, reduction="none")
    assert torch.isnan(values).tolist() == [row == at for row in range(3)]


@EXAMPLES
@given(pairs(), betas, st.floats(-40, 40), st.sampled_from([0.5, 2.0, 7.0]))
def test_i18_i21_shifts_change_nothing_and_temperature_is_a_power(
    pair: tuple[Tensor, Tensor], beta: float, shift: float, tau: float
) -> None:
    student, teacher = pair
    value = generalized_jsd_loss(student, teacher, beta=beta).item()
    assert generalized_jsd_loss(student + shift, teacher - shift, beta=beta).item() == pytest.approx(value, abs=EPS)
    powers = [torch.softmax(side, -1) ** (1 / tau) for side in pair]
    tempered = generalized_jsd_loss(student, teacher, beta=beta, temperature=tau).item()
    assert tempered == pytest.approx(
        generalized_jsd_loss(*(p / p.sum(-1, keepdim=True) for p in powers), beta=beta, logits_are_probs=True).item(),
        abs=EPS,
    )
    assert generalized_jsd_loss(student, teacher, beta=beta, temperature=1e6).item() < 1e-9


@EXAMPLES
@given(pairs(), names, st.sampled_from([math.nan, math.inf, -math.inf, 1e30]), st.permutations(range(3)))
def test_i19_masked_rows_and_the_order_of_samples_change_nothing(
    pair: tuple[Tensor, Tensor], name: str, junk: float, order: list[int]
) -> None:
    loss, (student, teacher) = LOSSES[name], pair
    if name in {"eopd", "policy"}:
        order = list(range(3))  # their sampled ids are bound to the row
    value, gradient = value_and_grad(loss, student, teacher)
    everyone = torch.ones(3, dtype=torch.bool)
    assert loss(student, teacher, everyone).item() == value
    assert loss(student[order], teacher[order]).item() == pytest.approx(value, rel=1e-12, abs=1e-15)
    more = torch.full((2, student.shape[1]), junk, dtype=torch.float64)
    mask = torch.cat([everyone, ~everyone[:2]])
    longer, wider = value_and_grad(loss, torch.cat([student, more]), torch.cat([teacher, more]), mask)
    assert longer == pytest.approx(value, rel=1e-12, abs=1e-15)
    torch.testing.assert_close(wider[:3], gradient, rtol=1e-12, atol=1e-15)
    assert not wider[3:].any()
    nobody, still = value_and_grad(loss, student, teacher, ~everyone)
    assert nobody == 0.0
    assert not still.any()


@EXAMPLES
@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(-5, 5)), min_size=1, max_size=6), st.floats(-1, 1))
def test_i20_a_ratio_of_one_is_minus_a_over_n_and_an_infinite_cap_is_none(
    tokens: list[tuple[float, float]], drift: float
) -> None:
    logp, a = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    for loss in (
        lambda new: importance_sampling_loss(new, logp, a),
        lambda new: importance_sampling_loss(new, logp, a, cap=1.0),
        lambda new: ppo_clip_loss(new, logp, a),
        lambda new: reinforce_loss(new, a),
    ):
        torch.testing.assert_close(value_and_grad(loss, logp)[1], -a / len(tokens), rtol=1e-12, atol=1e-15)
    plain = value_and_grad(lambda new: importance_sampling_loss(new, logp, a), logp + drift)[1]
    capped = value_and_grad(lambda new: importance_sampling_loss(new, logp, a, cap=math.inf), logp + drift)[1]
    torch.testing.assert_close(plain, capped, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(plain, -math.exp(drift) * a / len(tokens), rtol=1e-9, atol=1e-12)


@EXAMPLES
@given(pairs(), betas, st.integers(1, 2))
def test_i22_one_more_id_never_lowers_the_bucket_divergence(pair: tuple[Tensor, Tensor], beta: float, k: int) -> None:
    student, teacher = pair
    slim, wide = (sparse_divergence_loss(student, listed(teacher, n), beta=beta).item() for n in (k, k + 1))
    tail = (1 - torch.softmax(student, -1).gather(-1, listed(teacher, k + 1).ids).sum(-1)).min().item()
    if min(tail, listed(teacher, k + 1).tail_logp.exp().min().item()) > 1e-6:
        assert wide >= slim - EPS
        assert wide <= generalized_jsd_loss(student, teacher, beta=beta).item() + EPS
    extra = listed(teacher, k + 1).head(k)
    assert sparse_divergence_loss(student, extra, beta=beta).item() == pytest.approx(slim, rel=1e-9, abs=1e-12)


@EXAMPLES
@given(pairs(), st.floats(0.0, 1.0))
def test_i23_taids_gradient_is_s_minus_its_target(pair: tuple[Tensor, Tensor], t: float) -> None:
    student, teacher = pair
    s = torch.softmax(student, -1)
    for weight, target in ((0.0, s), (1.0, torch.softmax(teacher, -1)), (t, None)):
        p = torch.softmax((1 - weight) * student + weight * teacher, -1) if target is None else target
        _, gradient = value_and_grad(lambda z, w=weight: taid_loss(z, teacher, t=w), student)
        torch.testing.assert_close(gradient, (s - p) / 3, rtol=0, atol=1e-12)


@EXAMPLES
@given(
    st.lists(st.floats(0, 1e38), min_size=1, max_size=30),
    st.floats(0, 0.9),
    st.floats(0.01, 0.1),
    st.sampled_from([0.0, 5e-4, 0.5, 10.0]),
)
def test_i24_the_schedule_never_falls_nor_passes_its_end_and_is_the_line_at_alpha_zero(
    losses: list[float], start: float, gap: float, alpha: float
) -> None:
    schedule = TAIDScheduler(len(losses), t_start=start, t_end=start + gap, alpha=alpha)
    last = schedule.t
    for step, loss in enumerate(losses):
        schedule.update_t(loss, step)
        assert last <= schedule.t <= start + gap + 1e-7
        last = schedule.t
        if alpha == 0.0 and step:
            assert schedule.t == pytest.approx(start + gap * step / len(losses), abs=1e-6)


@EXAMPLES
@given(pairs())
def test_i25_kd_minus_the_teachers_entropy_is_forward_kl(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    excess = KDLoss()(student, teacher, None) - teacher_entropy(teacher).mean()
    assert excess.item() >= -EPS
    assert excess.item() == pytest.approx(generalized_jsd_loss(student, teacher, beta=0.0).item(), abs=EPS)


@EXAMPLES
@given(pairs())
def test_i26_the_gate_chooses_between_forward_and_reverse_kl(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    forward, reverse = (generalized_jsd_loss(student, teacher, beta=beta).item() for beta in (0.0, 1.0))
    assert entropy_aware_opd_loss(student, teacher, h_max=1e-9).item() == pytest.approx(forward, rel=1e-6, abs=EPS)
    assert entropy_aware_opd_loss(student, teacher, h_max=1e12).item() == pytest.approx(reverse, rel=1e-6, abs=1e-9)
    assert entropy_aware_opd_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-12)
    rows = [entropy_aware_opd_loss(student[[r]], teacher[[r]]).item() for r in range(3)]
    for r, value in enumerate(rows):
        ends = [generalized_jsd_loss(student[[r]], teacher[[r]], beta=beta).item() for beta in (0.0, 1.0)]
        assert min(ends) - EPS <= value <= max(ends) + EPS
