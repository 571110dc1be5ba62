"""The sampled-token advantages, from two scalars."""

import math

import numpy as np
import pytest

from tests.topk import reference
from tests.topk.lists import log_softmax, random_logp
from topkd.topk import forward_kl_advantage, gjs, gjs_advantage, kl_k1, kl_k3, scalar_kl_advantage
from topkd.topk.errors import ConfigError

BETAS = (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("beta", BETAS)
def test_every_advantage_matches_the_reference_over_far_apart_logprobs(beta: float) -> None:
    grid = -np.concatenate([np.linspace(1e-6, 1e-3, 4), np.linspace(0.01, 3, 9), np.linspace(4, 60, 8)])
    teacher, student = (axis.ravel() for axis in np.meshgrid(grid, grid))
    got = gjs_advantage(teacher, student, beta)
    expected = [reference.advantage(t, s, beta) for t, s in zip(teacher, student, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.999999, 1.0])
def test_small_differences_keep_their_digits(beta: float) -> None:
    student = np.full(5, -3.0)
    small = np.array([1e-12, -1e-12, 1e-9, -1e-9, 1e-6])
    slope = {0.0: 1.0, 1.0: 1.0}.get(beta, (1 - beta) * beta)
    exact_difference = (student + small) - student
    np.testing.assert_allclose(gjs_advantage(student + small, student, beta), slope * exact_difference, rtol=2e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_the_expected_policy_gradient_is_minus_the_gradient_of_the_divergence(beta: float) -> None:
    rng = np.random.default_rng(7)
    for _ in range(5):
        logits = rng.normal(size=12)
        teacher = random_logp(rng, 12)
        s = np.exp(log_softmax(logits))
        score = np.eye(12) - s  # row y: d log s(y) / d logits
        estimate = (s * gjs_advantage(teacher, log_softmax(logits), beta)) @ score
        step = 1e-5
        numeric = [
            (
                gjs(teacher, log_softmax(logits + step * unit), beta)
                - gjs(teacher, log_softmax(logits - step * unit), beta)
            )
            / (2 * step)
            for unit in np.eye(12)
        ]
        np.testing.assert_allclose(estimate, -np.array(numeric), atol=2e-9)
        np.testing.assert_allclose(estimate, -np.array(reference.gjs_gradient(np.exp(teacher), s, beta)), atol=1e-13)


def test_the_divergence_as_an_advantage_has_no_gradient_in_expectation() -> None:
    rng = np.random.default_rng(3)
    s, teacher = np.exp(random_logp(rng, 9)), random_logp(rng, 9)
    value = gjs(teacher, np.log(s), 0.5)
    assert value > 0.01
    np.testing.assert_allclose((s * value) @ (np.eye(9) - s), 0.0, atol=1e-15)


def test_scalar_and_forward_kl_are_the_two_ends() -> None:
    teacher, student = np.array([-0.2, -4.0]), np.array([-1.2, -0.5])
    np.testing.assert_array_equal(scalar_kl_advantage(teacher, student), teacher - student)
    np.testing.assert_allclose(forward_kl_advantage(teacher, student), np.exp(teacher - student) - 1, rtol=1e-15)


@pytest.mark.parametrize("beta", BETAS)
def test_unknown_stays_unknown_and_a_zero_student_is_masked(beta: float) -> None:
    teacher = np.array([np.nan, -1.0, -1.0, np.nan, -np.inf])
    student = np.array([-1.0, np.nan, -np.inf, np.nan, -np.inf])
    assert np.isnan(gjs_advantage(teacher, student, beta)).all()


def test_a_token_the_teacher_rules_out_is_bounded_inside_and_masked_at_reverse_kl() -> None:
    ruled_out, student = np.array([-np.inf]), np.array([-0.7])
    assert gjs_advantage(ruled_out, student, 0.5)[0] == pytest.approx(0.5 * math.log(0.5))
    assert gjs_advantage(ruled_out, student, 0.9)[0] == pytest.approx(0.1 * math.log(0.1))
    assert gjs_advantage(ruled_out, student, 0.0)[0] == -1.0
    assert np.isnan(gjs_advantage(ruled_out, student, 1.0)[0])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 1, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_shape_and_dtype_comes_back_as_it_went_in(shape: tuple[int, ...], dtype: type) -> None:
    rng = np.random.default_rng(0)
    teacher, student = (-rng.random(shape).astype(dtype) for _ in range(2))
    teacher, student = np.asarray(teacher, dtype=dtype), np.asarray(student, dtype=dtype)
    before = teacher.copy(), student.copy()
    got = gjs_advantage(teacher, student, 0.4)
    assert got.shape == shape
    assert got.dtype == dtype
    np.testing.assert_array_equal(teacher, before[0])
    np.testing.assert_array_equal(student, before[1])
    expected = np.vectorize(lambda t, s: reference.advantage(t, s, 0.4), otypes=[float])(teacher, student)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_float32_advantages_are_computed_in_float64() -> None:
    teacher, student = np.float32([-1.0000001, -88.0]), np.float32([-1.0000002, -0.5])
    exact = gjs_advantage(teacher.astype(np.float64), student.astype(np.float64), 0.5)
    np.testing.assert_array_equal(gjs_advantage(teacher, student, 0.5), exact.astype(np.float32))


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan])
def test_beta_outside_zero_to_one_is_refused(beta: float) -> None:
    with pytest.raises(ConfigError, match="beta"):
        gjs_advantage([-1.0], [-1.0], beta)


def test_what_cannot_be_logprobs_of_the_same_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="logits"):
        gjs_advantage([2.5], [-1.0], 0.5)
    with pytest.raises(ConfigError, match="shape"):
        gjs_advantage(np.zeros((3, 1)) - 1, np.zeros(3) - 1, 0.5)
    with pytest.raises(ConfigError, match="teacher_logp: not an array of numbers"):
        scalar_kl_advantage(np.array(["a"]), np.array([-1.0]))


def test_both_kl_estimates_have_the_mean_and_the_sign_of_a_kl() -> None:
    rng = np.random.default_rng(1)
    student, other = random_logp(rng, 40), random_logp(rng, 40)
    s, truth = np.exp(student), gjs(other, student, 1.0)
    assert s @ kl_k1(other, student) == pytest.approx(truth, rel=1e-12)
    assert s @ kl_k3(other, student) == pytest.approx(truth, rel=1e-12)
    assert (kl_k3(other, student) >= 0).all()
    reversed_difference = s @ (np.expm1(student - other) - (student - other))
    assert reversed_difference > 1.5 * truth


def test_kl_estimates_of_unknown_tokens_are_unknown() -> None:
    assert np.isnan(kl_k1([np.nan, -1.0], [-1.0, -np.inf])).all()
    assert np.isnan(kl_k3([np.nan, -1.0], [-1.0, -np.inf])).all()
    assert kl_k1([-np.inf], [-1.0])[0] == math.inf
    assert kl_k3([-np.inf], [-1.0])[0] == math.inf
