"""Dense GJS and its restrictions to a shared support."""

import math

import numpy as np
import pytest

from tests.topk import reference
from tests.topk.lists import random_logp
from topkd.topk import gjs, shared_support_gjs
from topkd.topk.errors import ConfigError

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TAILS = ("bucket", "renormalise", "partial")


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 2), (4, 7), (2, 333)])
def test_dense_gjs_matches_the_reference(beta: float, rows: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    teacher, student = random_logp(rng, rows, vocab, scale=4), random_logp(rng, rows, vocab, scale=4)
    expected = [reference.gjs(t, s, beta) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)]
    np.testing.assert_allclose(gjs(teacher, student, beta), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
def test_shared_support_matches_the_reference(beta: float, tail: str) -> None:
    rng = np.random.default_rng(5)
    teacher, student = (random_logp(rng, 2, 3, 20)[..., :6] for _ in range(2))
    got = shared_support_gjs(teacher, student, beta, tail)
    assert got.shape == (2, 3)
    expected = [
        reference.shared(t, s, beta, tail)
        for t, s in zip(teacher.reshape(-1, 6).tolist(), student.reshape(-1, 6).tolist(), strict=True)
    ]
    np.testing.assert_allclose(got.ravel(), expected, rtol=1e-10, atol=1e-13)


def test_zero_is_forward_and_one_is_reverse_kl() -> None:
    teacher, student = np.log([0.8, 0.2]), np.log([0.3, 0.7])
    forward = 0.8 * math.log(0.8 / 0.3) + 0.2 * math.log(0.2 / 0.7)
    reverse = 0.3 * math.log(0.3 / 0.8) + 0.7 * math.log(0.7 / 0.2)
    assert forward != pytest.approx(reverse, abs=1e-3)
    assert gjs(teacher, student, 0.0) == pytest.approx(forward, rel=1e-14)
    assert gjs(teacher, student, 1.0) == pytest.approx(reverse, rel=1e-14)


def test_impossible_tokens_cost_nothing_inside_and_infinity_at_the_kl_they_break() -> None:
    teacher, student = np.log([0.5, 0.5, 1e-300]), np.log([0.5, 1e-300, 0.5])
    teacher[2] = student[1] = -np.inf
    assert gjs(teacher, student, 0.5) == pytest.approx(0.5 * math.log(2), rel=1e-14)
    assert gjs(teacher, student, 0.0) == math.inf
    assert gjs(teacher, student, 1.0) == math.inf
    assert gjs(teacher, teacher, 0.0) == 0.0


def test_a_token_too_improbable_for_a_double_still_breaks_the_kl() -> None:
    """exp(-1e4) is 0.0, and 0 * inf would be nan: no signal, where there is one."""
    masked, never = np.array([*np.log([0.5, 0.5]), -1e4]), np.array([*np.log([0.5, 0.5]), -np.inf])
    for tail in TAILS:
        assert shared_support_gjs(masked, never, 0.0, tail) == math.inf
        assert shared_support_gjs(never, masked, 0.0, tail) == pytest.approx(0.0, abs=1e-15)
    assert gjs(never, masked, 1.0) == math.inf
    assert gjs(never, masked, 0.5) == pytest.approx(0.0, abs=1e-15)
    assert np.isnan(shared_support_gjs(np.array([np.nan, -0.1]), np.array([-np.inf, -0.1]), 0.0, "partial"))


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.5, 0.99])
def test_the_interior_integrand_is_never_negative(beta: float) -> None:
    rng = np.random.default_rng(2)
    teacher, student = random_logp(rng, 50, 30, scale=6), random_logp(rng, 50, 30, scale=6)
    single = shared_support_gjs(teacher[..., None], student[..., None], beta, "partial")
    assert (single >= -1e-17).all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", BETAS)
def test_a_row_without_signal_is_nan_never_zero(tail: str, beta: float) -> None:
    hole, some = np.full(3, -np.inf), np.log([0.2, 0.3, 0.1])
    unknown = np.array([-1.0, np.nan, -2.0])
    teacher, student = np.stack([hole, some, some, unknown, hole]), np.stack([some, hole, unknown, some, hole])
    assert np.isnan(shared_support_gjs(teacher, student, beta, tail)).all()
    dense = np.array([*np.log([0.5, 0.5]), -np.inf])
    assert np.isnan(gjs(np.stack([hole, unknown]), np.stack([dense, dense]), beta)).all()


def test_padded_entries_change_nothing() -> None:
    rng = np.random.default_rng(8)
    teacher, student = random_logp(rng, 4, 10)[:, :5], random_logp(rng, 4, 10)[:, :5]
    pad = np.full((4, 3), -np.inf)
    for tail in TAILS:
        for beta in BETAS:
            np.testing.assert_allclose(
                shared_support_gjs(np.hstack([teacher, pad]), np.hstack([student, pad]), beta, tail),
                shared_support_gjs(teacher, student, beta, tail),
                rtol=1e-13,
            )


def test_a_distribution_that_is_not_dense_is_refused_where_dense_is_asked_for() -> None:
    full, part = np.log([0.5, 0.5]), np.log([0.5, 0.2])
    with pytest.raises(ConfigError, match="shared_support_gjs"):
        gjs(part, full, 0.5)
    with pytest.raises(ConfigError, match="student_logp is not a full distribution"):
        gjs(np.stack([full, full]), np.stack([full, part]), 0.5)


def test_wrong_shapes_tails_and_masses_are_refused() -> None:
    full = np.log([0.5, 0.5])
    with pytest.raises(ConfigError, match="shape"):
        gjs(full, np.log([0.3, 0.3, 0.4]), 0.5)
    with pytest.raises(ConfigError):
        gjs(-1.0, -1.0, 0.5)
    with pytest.raises(ConfigError, match="tail"):
        shared_support_gjs(full, full, 0.5, "floor")
    with pytest.raises(ConfigError, match="mass above 1"):
        shared_support_gjs(np.log([0.9, 0.9]), full, 0.5)
    with pytest.raises(ConfigError, match="beta"):
        shared_support_gjs(full, full, 2.0)


def test_inputs_are_left_as_they_were() -> None:
    teacher, student = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    copies = teacher.copy(), student.copy()
    gjs(teacher, student, 0.5)
    shared_support_gjs(teacher, student, 0.5, "renormalise")
    np.testing.assert_array_equal(teacher, copies[0])
    np.testing.assert_array_equal(student, copies[1])
