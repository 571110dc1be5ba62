"""Importance sampling, PPO, IcePop and REINFORCE: values, gradients, masks and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from topkd.topk.errors import ConfigError
from topkd.topk.losses import icepop_loss, importance_sampling_loss, ppo_clip_loss, reinforce_loss

LOSSES = {
    "plain": importance_sampling_loss,
    "truncated": lambda n, b, a, m, **kw: importance_sampling_loss(n, b, a, m, cap=2.0, **kw),
    "ppo": ppo_clip_loss,
    "ppo_dual": lambda n, b, a, m, **kw: ppo_clip_loss(n, b, a, m, dual_clip=3.0, **kw),
    "icepop": icepop_loss,
    "reinforce": lambda n, b, a, m, **kw: reinforce_loss(n, a, m, **kw),
}


def batch(seed: int, shape: tuple[int, ...] = (4, 7), spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    new = -torch.rand(shape, generator=g, dtype=torch.float64) * 3 - 0.01
    behavior = new + spread * torch.randn(shape, generator=g, dtype=torch.float64)
    advantages = torch.randn(shape, generator=g, dtype=torch.float64)
    mask = torch.rand(shape, generator=g) < 0.7
    return new.requires_grad_(), behavior, advantages, mask


def grad(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss, at, retain_graph=True)[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_each_form_is_the_published_one(seed: int) -> None:
    new, behavior, adv, mask = batch(seed)
    ratio, n = (new - behavior).detach().exp(), mask.sum()
    m = mask.double()
    wanted = {
        "plain": -m * ratio * adv / n,
        "truncated": -m * ratio.clamp(max=2.0) * adv / n,
        "icepop": -m * torch.where((ratio >= 0.5) & (ratio <= 5.0), ratio, 0.0) * adv / n,
        "reinforce": -m * adv / n,
        "ppo": -m * torch.where(torch.where(adv > 0, ratio > 1.2, ratio < 0.8), 0.0, ratio) * adv / n,
    }
    wanted["ppo_dual"] = torch.where((adv < 0) & (ratio > 3.0), 0.0, wanted["ppo"])
    for name, expected in wanted.items():
        torch.testing.assert_close(grad(LOSSES[name](new, behavior, adv, mask), new), expected, rtol=1e-12, atol=1e-15)


def test_the_values_are_the_published_ones_on_numbers_worked_by_hand() -> None:
    new = torch.tensor([math.log(0.5), math.log(0.2)], dtype=torch.float64)
    behavior = torch.tensor([math.log(0.1), math.log(0.4)], dtype=torch.float64)  # ratios 5 and 0.5
    adv = torch.tensor([2.0, -1.0], dtype=torch.float64)
    assert importance_sampling_loss(new, behavior, adv).item() == pytest.approx(-(5 * 2 - 0.5) / 2)
    assert importance_sampling_loss(new, behavior, adv, reduction="sum").item() == pytest.approx(-9.5)
    truncated = -(2 * 2 * math.log(0.5) - 0.5 * math.log(0.2)) / 2
    assert importance_sampling_loss(new, behavior, adv, cap=2.0).item() == pytest.approx(truncated)
    assert ppo_clip_loss(new, behavior, adv).item() == pytest.approx((-1.2 * 2 + 0.8) / 2)
    assert ppo_clip_loss(behavior, new, adv, dual_clip=1.5).item() == pytest.approx((-0.2 * 2 + 1.5) / 2)
    kept = -(0.5 * -1.0 * math.log(0.2)) / 2
    assert icepop_loss(new, behavior, adv, high=4.0).item() == pytest.approx(kept)
    assert reinforce_loss(new, adv).item() == pytest.approx(-(2 * math.log(0.5) - math.log(0.2)) / 2)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_on_policy_every_form_has_the_gradient_minus_advantage_over_n(name: str) -> None:
    new, _, adv, mask = batch(5)
    loss = LOSSES[name](new, new.detach(), adv, mask)
    torch.testing.assert_close(grad(loss, new), -(mask * adv) / mask.sum(), rtol=1e-12, atol=1e-15)


def test_an_infinite_cap_gives_the_gradient_of_the_plain_form() -> None:
    new, behavior, adv, mask = batch(6, spread=3.0)
    plain = grad(importance_sampling_loss(new, behavior, adv, mask), new)
    capped = grad(importance_sampling_loss(new, behavior, adv, mask, cap=math.inf), new)
    torch.testing.assert_close(capped, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_masked_positions_change_nothing_whatever_they_hold(name: str) -> None:
    new, behavior, adv, _ = batch(7, (11,))
    clean = LOSSES[name](new, behavior, adv, None)
    dirt = torch.tensor([math.nan, -math.inf, math.inf, -99999.0], dtype=torch.float64)
    wide = torch.cat([new.detach(), dirt]).requires_grad_()
    mask = torch.arange(15) < 11
    loss = LOSSES[name](wide, torch.cat([behavior, dirt.flip(0)]), torch.cat([adv, dirt]), mask)
    assert loss.item() == pytest.approx(clean.item(), rel=1e-14)
    assert torch.equal(grad(loss, wide)[11:], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(grad(loss, wide)[:11], grad(clean, new))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_valid_token_gives_exactly_zero_and_zero_gradients(name: str) -> None:
    new, behavior, adv, mask = batch(8)
    loss = LOSSES[name](new, behavior, adv * math.nan, torch.zeros_like(mask))
    assert loss.item() == 0.0
    assert torch.equal(grad(loss, new), torch.zeros_like(new))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_micro_batches_divided_by_global_tokens_add_up_to_the_whole_batch(name: str) -> None:
    new, behavior, adv, mask = batch(9)
    whole = LOSSES[name](new, behavior, adv, mask)
    parts = sum(LOSSES[name](new[i], behavior[i], adv[i], mask[i], num_tokens=int(mask.sum())) for i in range(4))
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(grad(parts, new), grad(whole, new), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["plain", "ppo", "ppo_dual"])
def test_finite_differences_agree_where_the_ratio_is_part_of_the_value(name: str) -> None:
    new, behavior, adv, mask = batch(10)
    assert gradcheck(lambda x: LOSSES[name](x, behavior, adv, mask), (new,))


@pytest.mark.parametrize("name", ["truncated", "icepop", "reinforce"])
def test_finite_differences_agree_with_the_detached_weight_held_fixed(name: str) -> None:
    new, behavior, adv, mask = batch(11)
    analytic = grad(LOSSES[name](new, behavior, adv, mask), new)
    step = 1e-6
    for index in mask.nonzero()[:5]:
        i, j = index.tolist()
        up, down = new.detach().clone(), new.detach().clone()
        up[i, j] += step
        down[i, j] -= step
        # moving behaviour along with the logprob holds the ratio, so that only the log moves
        moved = behavior.clone()
        moved[i, j] += step
        back = behavior.clone()
        back[i, j] -= step
        numeric = (LOSSES[name](up, moved, adv, mask) - LOSSES[name](down, back, adv, mask)) / (2 * step)
        assert numeric.item() == pytest.approx(analytic[i, j].item(), rel=1e-5, abs=1e-9)


def test_advantages_and_behaviour_never_receive_a_gradient() -> None:
    new, behavior, adv, mask = batch(12)
    behavior.requires_grad_()
    adv.requires_grad_()
    for loss in LOSSES.values():
        loss(new, behavior, adv, mask).backward()
    assert behavior.grad is None
    assert adv.grad is None


def test_the_log_ratio_is_clamped_and_still_has_a_gradient() -> None:
    new = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    loss = importance_sampling_loss(new, torch.tensor([-61.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert loss.item() == pytest.approx(-math.exp(20))
    assert grad(loss, new).item() == pytest.approx(-math.exp(20))


@pytest.mark.parametrize("name", ["plain", "truncated", "icepop"])
def test_a_token_that_became_impossible_weighs_nothing(name: str) -> None:
    new = torch.tensor([-math.inf, -1.0], dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name](new, torch.full((2,), -1.0).double(), torch.ones(2).double(), None)
    assert math.isfinite(loss.item())
    assert grad(loss, new).tolist() == pytest.approx([0.0, -0.5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32_and_float64_stays(dtype: torch.dtype) -> None:
    new, behavior, adv, mask = (x.detach() for x in batch(13))
    exact = importance_sampling_loss(new.to(dtype).double(), behavior.to(dtype).double(), adv.to(dtype).double(), mask)
    loss = importance_sampling_loss(new.to(dtype), behavior.to(dtype), adv.to(dtype), mask)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(4, 7, dtype=torch.long)}, "a mask must be boolean"),
        ({"mask": torch.ones(4, 6, dtype=torch.bool)}, "differ in shape"),
        ({"advantages": torch.zeros(7)}, "advantages and logp_new differ in shape"),
        ({"logp_behavior": torch.full((4, 7), math.nan)}, "logp_behavior is not finite"),
        ({"logp_behavior": torch.full((4, 7), -math.inf)}, "logp_behavior is not finite"),
        ({"advantages": torch.full((4, 7), math.nan)}, "advantages is not finite"),
        ({"cap": 0.0}, "cap must be positive"),
        ({"reduction": "median"}, "unknown reduction"),
        ({"num_tokens": 0}, "num_tokens must be positive"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(change: dict[str, object], message: str) -> None:
    new, behavior, adv, _ = batch(14)
    arguments = {"logp_new": new, "logp_behavior": behavior, "advantages": adv, "mask": None} | change
    with pytest.raises(ConfigError, match=message):
        importance_sampling_loss(**arguments)


def test_clip_settings_outside_their_range_are_refused() -> None:
    new, behavior, adv, mask = batch(15)
    with pytest.raises(ConfigError, match="clip must lie"):
        ppo_clip_loss(new, behavior, adv, mask, clip=1.5)
    with pytest.raises(ConfigError, match="dual_clip must be above 1"):
        ppo_clip_loss(new, behavior, adv, mask, dual_clip=0.5)
    with pytest.raises(ConfigError, match="low < high"):
        icepop_loss(new, behavior, adv, mask, low=2.0, high=1.0)
