"""TAID's schedule: never backwards, never past the end, and unmoved by losses that say nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from topkd.topk.errors import ConfigError
from topkd.topk.losses import TAIDScheduler

finite = st.floats(0, 50, allow_nan=False)


@settings(deadline=None)
@given(st.lists(finite, min_size=2, max_size=40), st.floats(0, 1), st.floats(0, 0.99))
def test_t_never_falls_and_never_passes_t_end(losses: list[float], alpha: float, beta: float) -> None:
    schedule = TAIDScheduler(len(losses), t_start=0.2, t_end=0.9, alpha=alpha, beta=beta)
    seen = [schedule.t]
    for step, loss in enumerate(losses):
        schedule.update_t(loss, step)
        seen.append(schedule.t)
    assert all(b >= a for a, b in itertools.pairwise(seen))
    assert seen[0] == pytest.approx(0.2)
    assert seen[-1] <= 0.9 + 1e-7


@settings(deadline=None)
@given(st.lists(finite, min_size=3, max_size=30))
def test_without_the_adaptive_part_t_is_the_line(losses: list[float]) -> None:
    still = TAIDScheduler(len(losses), alpha=0.0)
    linear = TAIDScheduler(len(losses), disable_adaptive=True)
    for step, loss in enumerate(losses):
        still.update_t(loss, step)
        linear.update_t(loss, step)
        if step:
            assert linear.t == pytest.approx(0.4 + 0.6 * step / len(losses), abs=1e-6)
            assert still.t == linear.t


def test_a_falling_loss_runs_ahead_of_a_rising_one() -> None:
    falling, rising = (TAIDScheduler(1000, alpha=0.05, beta=0.5) for _ in range(2))
    for step in range(20):
        falling.update_t(10.0 * 0.7**step, step)
        rising.update_t(10.0 * 1.3**step, step)
    assert falling.t > rising.t > 0.4


@settings(deadline=None)
@given(st.lists(finite, min_size=2, max_size=20), st.integers(0, 19), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_losses_that_are_not_finite_change_nothing(losses: list[float], at: int, bad: float) -> None:
    clean, dirty = (TAIDScheduler(50, alpha=0.1, beta=0.9) for _ in range(2))
    for step, loss in enumerate(losses):
        if step == at:
            assert dirty.update_t(bad, step) is None
        clean.update_t(loss, step)
        dirty.update_t(loss, step)
    assert dirty.skipped == (at < len(losses))
    assert {**clean.state_dict(), "skipped": 0} == {**dirty.state_dict(), "skipped": 0}


def test_a_loss_of_zero_leaves_a_finite_momentum() -> None:
    schedule = TAIDScheduler(10, beta=0.0)
    for step, loss in enumerate([1.0, 0.0, 1.0]):
        schedule.update_t(loss, step)
    assert schedule.momentum == pytest.approx(-1e8, rel=1e-3)


def test_a_negative_loss_has_the_relative_change_of_the_formula() -> None:
    schedule = TAIDScheduler(10, beta=0.0)
    schedule.update_t(-2.0, 0)
    schedule.update_t(-1.5, 1)
    assert schedule.momentum == pytest.approx((-2.0 + 1.5) / -2.0)


def test_a_restored_schedule_continues_where_it_stood() -> None:
    whole, first = TAIDScheduler(30, alpha=0.1), TAIDScheduler(30, alpha=0.1)
    losses = [5.0 / (1 + step) for step in range(30)]
    for step in range(12):
        whole.update_t(losses[step], step)
        first.update_t(losses[step], step)
    second = TAIDScheduler(30, alpha=0.1)
    second.load_state_dict(first.state_dict())
    for step in range(12, 30):
        assert second.update_t(losses[step], step) == whole.update_t(losses[step], step)
        assert second.t == whole.t


def test_the_first_loss_only_seeds_and_tensors_are_taken() -> None:
    schedule = TAIDScheduler(10)
    assert schedule.prev_loss is None
    assert schedule.update_t(torch.tensor(2.5, requires_grad=True).detach(), 0) is None
    assert schedule.prev_loss == 2.5
    assert schedule.t == pytest.approx(0.4)


@pytest.mark.parametrize(
    "change",
    [
        {"t_start": 1.0, "t_end": 1.0},
        {"t_start": 0.9, "t_end": 0.5},
        {"t_start": -0.1},
        {"t_end": 1.5},
        {"beta": 1.0},
        {"alpha": -1.0},
        {"num_train_steps": 0},
    ],
)
def test_settings_that_cannot_be_right_are_refused(change: dict[str, float]) -> None:
    arguments = {"num_train_steps": 10} | change
    with pytest.raises(ConfigError):
        TAIDScheduler(**arguments)


def test_a_state_that_lacks_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks keys"):
        TAIDScheduler(10).load_state_dict({"t": 0.5})


@pytest.mark.parametrize(
    "change",
    [{"t": "x"}, {"t": 9.0}, {"t": math.nan}, {"momentum": math.inf}, {"prev_loss": math.nan}, {"skipped": 1.5}],
)
def test_a_state_that_no_schedule_can_be_in_is_refused_and_changes_nothing(change: dict[str, object]) -> None:
    schedule = TAIDScheduler(10)
    before = schedule.state_dict()
    with pytest.raises(ConfigError, match="TAIDScheduler state"):
        schedule.load_state_dict({**before, **change})
    with pytest.raises(ConfigError, match="TAIDScheduler state"):
        schedule.load_state_dict(None)
    assert schedule.state_dict() == before
