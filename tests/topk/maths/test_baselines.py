"""Baselines, returns and entropy bounds."""

import math
from itertools import pairwise

import numpy as np
import pytest

from tests.topk import reference
from tests.topk.lists import random_logp, topk_of
from topkd.topk import (
    TopK,
    discounted_return,
    entropy_bounds,
    gjs_advantage,
    topk_value_baseline,
    value_baseline,
)
from topkd.topk.errors import ConfigError

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("beta", BETAS)
def test_the_baseline_is_the_mean_advantage(beta: float) -> None:
    rng = np.random.default_rng(0)
    teacher, student = random_logp(rng, 5, 30), random_logp(rng, 5, 30)
    mean = (np.exp(student) * gjs_advantage(teacher, student, beta)).sum(axis=1)
    np.testing.assert_allclose(value_baseline(teacher, student, beta), mean, atol=3e-6)
    lists = topk_value_baseline(topk_of(teacher, 30), topk_of(student, 30), beta)
    np.testing.assert_allclose(lists, mean, atol=3e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_the_stored_tail_keeps_the_baseline_of_a_list_that_was_rounded(beta: float) -> None:
    teacher, student = np.log([[0.6, 0.385, 0.015]]), np.log([[0.5, 0.3, 0.2]])
    exact = value_baseline(teacher[:, :2], student[:, :2], beta)
    rounded = teacher[:, :2] + np.log(1.0155)  # holds all mass now: what is left over is rounding
    kept = value_baseline(rounded, student[:, :2], beta, teacher_tail_logp=teacher[:, 2])
    np.testing.assert_allclose(kept, exact, atol=0.02)
    unknown = value_baseline(rounded, student[:, :2], beta, teacher_tail_logp=[np.nan])
    np.testing.assert_array_equal(unknown, value_baseline(rounded, student[:, :2], beta))
    assert beta < 1.0 or abs(unknown - exact) > 1.0
    with pytest.raises(ConfigError, match="teacher_tail_logp"):
        value_baseline(rounded, student[:, :2], beta, teacher_tail_logp=[-4.0, -4.0])


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_a_top_k_baseline_is_negative_and_reduces_the_variance(beta: float) -> None:
    rng = np.random.default_rng(1)
    teacher, student = random_logp(rng, 200, 60), random_logp(rng, 200, 60)
    at = np.argsort(-teacher, axis=1)[:, :20]
    baseline = value_baseline(*(np.take_along_axis(x, at, axis=1) for x in (teacher, student)), beta)
    s, advantage = np.exp(student), gjs_advantage(teacher, student, beta)
    assert (baseline <= 0).all()
    second_moment = (s * advantage**2).sum(axis=1).mean()
    assert (s * (advantage - baseline[:, None]) ** 2).sum(axis=1).mean() < 0.97 * second_moment


def test_a_baseline_without_signal_is_nan() -> None:
    hole, some = np.full((1, 3), -np.inf), np.log([[0.5, 0.2, 0.1]])
    for beta in BETAS:
        assert np.isnan(value_baseline(hole, some, beta)).all()
        assert np.isnan(topk_value_baseline(TopK.from_lists([[]]), TopK.from_lists([[(1, -1.0)]]), beta)).all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.95, 1.0])
def test_returns_discount_the_divergences_that_follow(gamma: float) -> None:
    rng = np.random.default_rng(2)
    lengths = [1, 5, 0, 17, 2, 64]
    advantage, divergence = rng.normal(size=sum(lengths)), rng.random(sum(lengths))
    edges = np.cumsum([0, *lengths])
    expected = [
        value
        for first, last in pairwise(edges)
        for value in reference.returns(advantage[first:last], divergence[first:last], gamma)
    ]
    got = discounted_return(advantage, divergence, gamma, lengths=lengths)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_a_state_only_return_leaves_out_its_own_step_and_is_refused_at_gamma_zero() -> None:
    divergence = np.array([0.3, 0.2, 0.1])
    np.testing.assert_allclose(discounted_return(None, divergence, 0.5), [-0.1 - 0.025, -0.05, 0.0])
    with pytest.raises(ConfigError, match="does not depend on the sampled token"):
        discounted_return(None, divergence, 0.0)


def test_an_unknown_divergence_hides_only_what_comes_before_it_in_its_sequence() -> None:
    divergence = np.array([0.1, 0.1, np.nan, 0.1, 0.1, 0.1])
    got = discounted_return(np.zeros(6), divergence, 0.9, lengths=[4, 2])
    assert np.isnan(got).tolist() == [True, True, False, False, False, False]


def test_returns_refuse_wrong_arguments() -> None:
    for kwargs, words in (
        ({"gamma": 1.5}, "gamma"),
        ({"gamma": 0.5, "lengths": [2]}, "lengths"),
        ({"gamma": 0.5, "lengths": [4, -1]}, "lengths"),
    ):
        with pytest.raises(ConfigError, match=words):
            discounted_return(np.zeros(3), np.zeros(3), **kwargs)
    with pytest.raises(ConfigError, match="shape"):
        discounted_return(np.zeros(2), np.zeros(3), 0.5)


@pytest.mark.parametrize("k", [1, 5, 39, 40])
def test_the_entropy_lies_between_its_bounds(k: int) -> None:
    rng = np.random.default_rng(k)
    logp = np.concatenate([random_logp(rng, 50, 40, scale=scale) for scale in (0.01, 1, 5)])
    truth = [reference.entropy(np.exp(row)) for row in logp]
    low, high = entropy_bounds(topk_of(logp, k), 40)
    assert (low <= np.array(truth) + 2e-6).all()
    assert (high >= np.array(truth) - 2e-6).all()
    if k >= 39:
        np.testing.assert_allclose(low, truth, atol=3e-6)
        np.testing.assert_allclose(high, truth, atol=3e-6)


def test_entropy_bounds_have_the_stated_form() -> None:
    scores = TopK.from_lists([[(3, math.log(0.5)), (9, math.log(0.3))], []])
    low, high = entropy_bounds(scores, 102)
    head = -0.5 * math.log(0.5) - 0.3 * math.log(0.3)
    assert low[0] == pytest.approx(head - 0.2 * math.log(0.2), rel=1e-6)
    assert high[0] == pytest.approx(head - 0.2 * math.log(0.2 / 100), rel=1e-6)
    assert np.isnan(low[1])
    assert np.isnan(high[1])


def test_exact_zeros_do_not_spoil_the_entropy() -> None:
    scores = TopK.from_lists([[(0, math.log(0.5)), (1, math.log(0.5)), (2, -math.inf)]])
    low, high = entropy_bounds(scores, 5)
    assert low[0] == pytest.approx(math.log(2), abs=1e-6)
    assert high[0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_vocabulary_smaller_than_the_ids_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        entropy_bounds(TopK.from_lists([[(7, -0.5)]]), 7)
