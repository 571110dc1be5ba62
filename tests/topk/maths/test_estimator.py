"""The top-K + sampled-tail estimator: its mean, enumerated over every realised token, is a gradient."""

import numpy as np
import pytest

from tests.topk import reference
from tests.topk.lists import listed_at, log_softmax, random_logp
from topkd.topk import TopK, gated_rows, gjs_advantage, topk_weights
from topkd.topk.errors import ConfigError

BETAS = (0.0, 0.3, 0.5, 0.9, 1.0)
V, K = 11, 4


def supports(rng: np.random.Generator, teacher: np.ndarray, student: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "teacher": np.argsort(-teacher)[:K],
        "student": np.argsort(-student)[:K],
        "random": rng.permutation(V)[:K],
    }


def slope(t: np.ndarray, s: np.ndarray, beta: float) -> np.ndarray:
    """d GJS / d s(bin), up to a constant that the sum over bins removes."""
    if beta == 0.0:
        return -t / s
    if beta == 1.0:
        return np.log(s / t)
    return (1 - beta) * np.log(s / (beta * t + (1 - beta) * s))


def gradient(t: np.ndarray, s: np.ndarray, beta: float) -> np.ndarray:
    """The gradient with respect to the student's logits."""
    direction = slope(t, s, beta)
    return s * (direction - s @ direction)


def bucket_gradient(t: np.ndarray, s: np.ndarray, ids: np.ndarray, beta: float) -> np.ndarray:
    """The same for the tail-bucket divergence on ``ids``: the chain rule through the bins."""
    outside = np.setdiff1d(np.arange(len(t)), ids)
    bins_t, bins_s = np.append(t[ids], 1 - t[ids].sum()), np.append(s[ids], s[outside].sum())
    of_bins = slope(bins_t, bins_s, beta)
    direction = np.empty_like(s)
    direction[ids], direction[outside] = of_bins[:-1], of_bins[-1]
    return s * (direction - s @ direction)


def expected_gradient(
    teacher: np.ndarray, student: np.ndarray, ids: np.ndarray, beta: float, lam: float, behavior: np.ndarray
) -> np.ndarray:
    """E over y ~ behaviour of sum w grad log s, one row of ``topk_weights`` for every y."""
    every = np.arange(V)
    scores = listed_at(np.tile(teacher, (V, 1)), np.tile(ids, (V, 1)), every)
    at_ids = student[scores.ids]
    w_ids, w_actual = topk_weights(scores, at_ids, student, beta=beta, lam=lam, is_weight=np.exp(student) / behavior)
    score = np.eye(V) - np.exp(student)
    per_y = np.einsum("yk,ykv->yv", w_ids, score[scores.ids]) + w_actual[:, None] * score
    return behavior @ per_y


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("support", ["teacher", "student", "random"])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("policy", ["on", "off"])
def test_the_mean_weight_is_the_gradient_of_the_blended_divergence(
    beta: float, support: str, lam: float, policy: str
) -> None:
    rng = np.random.default_rng(17)
    for _ in range(4):
        # Rounded once, so that the list, the realised token and the reference speak of the same teacher.
        teacher = random_logp(rng, V).astype(np.float32).astype(np.float64)
        student = random_logp(rng, V)
        behavior = np.exp(student) if policy == "on" else np.exp(random_logp(rng, V, scale=0.5))
        ids = supports(rng, teacher, student)[support]
        t, s = np.exp(teacher), np.exp(student)
        got = expected_gradient(teacher, student, ids, beta, lam, behavior)
        wanted = lam * gradient(t, s, beta) + (1 - lam) * bucket_gradient(t, s, ids, beta)
        np.testing.assert_allclose(got, -wanted, atol=1e-13)


@pytest.mark.parametrize("beta", BETAS)
def test_at_lambda_one_finite_differences_of_the_dense_divergence_agree(beta: float) -> None:
    rng = np.random.default_rng(2)
    teacher, logits = random_logp(rng, V), rng.normal(size=V)
    student = log_softmax(logits)
    got = expected_gradient(teacher, student, np.argsort(-teacher)[:K], beta, 1.0, np.exp(student))
    step = 1e-5
    numeric = [
        (
            reference.gjs(teacher, log_softmax(logits + step * unit), beta)
            - reference.gjs(teacher, log_softmax(logits - step * unit), beta)
        )
        / (2 * step)
        for unit in np.eye(V)
    ]
    np.testing.assert_allclose(got, -np.array(numeric), atol=3e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_an_empty_support_is_the_plain_sampled_estimator(beta: float) -> None:
    rng = np.random.default_rng(1)
    teacher, student = random_logp(rng, 6, V), random_logp(rng, 6, V)
    actual = rng.integers(0, V, 6)
    scores = listed_at(teacher, np.empty((6, 0), dtype=np.int64), actual)
    own = student[np.arange(6), actual]
    w_ids, w_actual = topk_weights(scores, np.empty((6, 0)), own, beta=beta, lam=1.0)
    assert w_ids.shape == (6, 0)
    np.testing.assert_allclose(w_actual, gjs_advantage(scores.actual_logp.astype(float), own, beta), rtol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_the_whole_vocabulary_is_the_dense_gradient_and_its_tail_is_gated(beta: float) -> None:
    rng = np.random.default_rng(4)
    teacher = random_logp(rng, V).astype(np.float32).astype(np.float64)
    student = random_logp(rng, V)
    got = expected_gradient(teacher, student, np.arange(V), beta, 0.3, np.exp(student))
    np.testing.assert_allclose(got, -gradient(np.exp(teacher), np.exp(student), beta), atol=1e-13)
    scores = listed_at(teacher[None], np.arange(V)[None], np.array([0]))
    assert gated_rows(scores, student[scores.ids]).all()


def test_gated_rows_have_no_baseline_and_no_tail_and_the_others_do() -> None:
    teacher = TopK(
        0,
        np.array([[0, 1], [0, 1]], dtype=np.int32),
        np.log(np.array([[0.6, 0.4], [0.5, 0.3]])),
        np.array([5, 5]),
        np.log(np.array([1e-8, 0.05])),
        np.array([-np.inf, np.log(0.2)]),
    )
    student = np.log(np.array([[0.3, 0.3], [0.3, 0.3]]))
    assert gated_rows(teacher, student).tolist() == [True, False]
    w_ids, w_actual = topk_weights(teacher, student, np.log([0.2, 0.2]), beta=1.0, lam=1.0)
    plain = 0.3 * np.log(np.array([0.6, 0.4]) / 0.3)
    np.testing.assert_allclose(w_ids[0], plain, rtol=1e-6)
    assert w_actual[0] == 0.0
    offset = np.log(0.2 / 0.4)
    np.testing.assert_allclose(w_ids[1], 0.3 * (np.log(np.array([0.5, 0.3]) / 0.3) - offset), rtol=1e-6)
    assert w_actual[1] == pytest.approx(np.log(0.05 / 0.2) - offset, rel=1e-6)


def test_the_stored_tail_is_used_and_not_derived_from_rounded_logprobs() -> None:
    ids, logp = np.array([[0, 1]], dtype=np.int32), np.log(np.array([[0.6, 0.3999]]))
    rounded = logp.astype(np.float16).astype(np.float32)
    student, own = np.log(np.array([[0.5, 0.3]])), np.log([0.1])
    exact = TopK(0, ids, logp, np.array([7]), np.log([5e-5]), np.log([1e-4]))
    stored = TopK(0, ids, rounded, np.array([7]), np.log([5e-5]), np.log([1e-4]))
    derived = TopK(0, ids, rounded, np.array([7]), np.log([5e-5]), np.array([np.nan]))
    tails = [topk_weights(x, student, own, beta=1.0, lam=1.0)[1][0] for x in (exact, stored, derived)]
    assert tails[1] == pytest.approx(tails[0], abs=1e-6)
    assert abs(tails[2] - tails[0]) > 0.1


def test_holes_are_nan_pads_are_zero_and_a_listed_token_needs_no_sampled_term() -> None:
    teacher = TopK(
        0,
        np.array([[3, 1, -1], [-1, -1, -1], [3, 1, 2], [3, 1, -1]], dtype=np.int32),
        np.array([[-0.5, -2, -np.inf], [-np.inf] * 3, [-0.5, -2, -3], [-0.5, -2, -np.inf]]),
        np.array([3, 3, 9, -1]),
        np.array([-0.5, -0.5, np.nan, np.nan]),
        np.full(4, np.nan),
    )
    student = np.full((4, 3), -2.0)
    w_ids, w_actual = topk_weights(teacher, student, np.full(4, -2.0), beta=0.5, lam=0.5)
    assert w_ids[0, 2] == 0.0
    assert w_actual[0] == 0.0
    assert np.isnan(w_ids[1]).all()
    assert np.isnan(w_actual[1:]).all()
    assert np.isfinite(w_ids[2:]).all()
    without_tail = topk_weights(teacher, student, np.full(4, np.nan), beta=0.5, lam=0.0)[1]
    np.testing.assert_array_equal(without_tail, [0.0, np.nan, 0.0, 0.0])
    student[0, 1] = np.nan
    assert np.isnan(topk_weights(teacher, student, np.full(4, -2.0), beta=0.5, lam=0.5)[0][0]).all()


def test_impossible_tokens_have_the_limits_of_the_formula() -> None:
    teacher = TopK(
        0, np.array([[0, 1]]), np.array([[-0.7, -np.inf]]), np.array([0]), np.array([-0.7]), np.array([-0.9])
    )
    student = np.array([[-np.inf, -1.0]])
    forward, _ = topk_weights(teacher, student, [-1.0], beta=0.0, lam=1.0)
    assert forward[0, 0] == pytest.approx(np.exp(-0.7), rel=1e-6)
    inside, _ = topk_weights(teacher, student, [-1.0], beta=0.5, lam=1.0)
    assert inside[0, 0] == 0.0
    assert np.isfinite(inside).all()
    reverse, _ = topk_weights(teacher, student, [-1.0], beta=1.0, lam=1.0)
    assert reverse[0].tolist() == [0.0, 0.0]


def test_at_reverse_kl_a_listed_id_of_no_probability_joins_the_tail() -> None:
    nothing = {"actual_ids": [5], "actual_logp": [-2.0]}
    with_zero = TopK.from_lists([[(0, -0.7), (1, -1.2), (2, -np.inf)]], **nothing)
    without = TopK.from_lists([[(0, -0.7), (1, -1.2)]], **nothing)
    student = np.array([[-1.0, -1.5, -2.0]])
    for lam in (0.0, 1.0):
        got = topk_weights(with_zero, student, [-2.5], beta=1.0, lam=lam)
        expected = topk_weights(without, student[:, :2], [-2.5], beta=1.0, lam=lam)
        np.testing.assert_allclose(got[0][:, :2], expected[0], rtol=1e-12)
        assert got[0][0, 2] == 0.0
        np.testing.assert_allclose(got[1], expected[1], rtol=1e-12)
    ruled_out = TopK.from_lists([[(0, -0.7), (2, -np.inf)]], actual_ids=[2], actual_logp=[-np.inf])
    assert np.isnan(topk_weights(ruled_out, student[:, :2], [-2.5], beta=1.0, lam=1.0)[1]).all()
    assert np.isfinite(topk_weights(ruled_out, student[:, :2], [-2.5], beta=0.5, lam=1.0)[1]).all()


def test_float32_in_is_float32_out_and_close_to_float64() -> None:
    rng = np.random.default_rng(8)
    teacher, student = random_logp(rng, 9, 50), random_logp(rng, 9, 50)
    actual = rng.integers(0, 50, 9)
    scores = listed_at(teacher, np.argsort(-teacher, axis=1)[:, :8], actual)
    at, own = np.take_along_axis(student, scores.ids.astype(int), axis=1), student[np.arange(9), actual]
    exact = topk_weights(scores, at, own, beta=0.5, lam=0.3)
    short = topk_weights(scores, at.astype(np.float32), own.astype(np.float32), beta=0.5, lam=0.3)
    for a, b in zip(exact, short, strict=True):
        assert b.dtype == np.float32
        np.testing.assert_allclose(b, a, atol=3e-7)


def test_wrong_arguments_are_refused() -> None:
    teacher = TopK.from_lists([[(1, -0.5)]], actual_ids=[1], actual_logp=[-0.5])
    for change, words in (
        ({"lam": 1.5}, "lam"),
        ({"beta": -1.0}, "beta"),
        ({"is_weight": np.ones(3)}, "is_weight"),
    ):
        with pytest.raises(ConfigError, match=words):
            topk_weights(teacher, np.array([[-0.5]]), np.array([-0.5]), **{"beta": 0.5, "lam": 0.3, **change})
    with pytest.raises(ConfigError, match=r"student_logp_at_ids: wrong shape"):
        topk_weights(teacher, np.array([-0.5]), np.array([-0.5]), beta=0.5, lam=0.3)
    with pytest.raises(ConfigError, match="mass above 1"):
        topk_weights(
            TopK.from_lists([[(1, -0.5), (2, -1.5)]]), np.array([[-0.1, -0.1]]), np.array([-0.5]), beta=0.5, lam=0.3
        )
