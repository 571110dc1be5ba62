"""A slow float64 reference of MATH, one position at a time, in plain Python. It shares no code with topkd.

Distributions are lists or dicts of natural-log probabilities. beta is the mixture weight of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

NAN = math.nan


def prob(logp: float) -> float:
    return 0.0 if logp == -math.inf else math.exp(logp)


def term(p: float, q: float) -> float:
    """p log(p/q), with 0 log 0 = 0 and p > 0 = q giving infinity."""
    if p == 0.0:
        return 0.0
    return math.inf if q == 0.0 else p * (math.log(p) - math.log(q))


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return math.fsum(term(a, b) for a, b in zip(p, q, strict=True))


def gjs_of(t: Sequence[float], s: Sequence[float], beta: float) -> float:
    """GJS of probabilities (bins need not sum to one)."""
    if beta == 0.0:
        return kl(t, s)
    if beta == 1.0:
        return kl(s, t)
    m = [beta * a + (1.0 - beta) * b for a, b in zip(t, s, strict=True)]
    return beta * kl(t, m) + (1.0 - beta) * kl(s, m)


def gjs(teacher_logp: Sequence[float], student_logp: Sequence[float], beta: float) -> float:
    return gjs_of([prob(x) for x in teacher_logp], [prob(x) for x in student_logp], beta)


def binary_entropy(beta: float) -> float:
    return -sum(x * math.log(x) for x in (beta, 1.0 - beta) if x > 0.0)


def advantage(teacher_logp: float, student_logp: float, beta: float) -> float:
    t, s = prob(teacher_logp), prob(student_logp)
    if beta == 0.0:
        return t / s - 1.0
    if beta == 1.0:
        return NAN if t == 0.0 else math.log(t) - math.log(s)
    m = beta * t + (1.0 - beta) * s
    return (1.0 - beta) * (math.log(m) - math.log(s))


def shared(teacher_logp: Sequence[float], student_logp: Sequence[float], beta: float, tail: str) -> float:
    t, s = [prob(x) for x in teacher_logp], [prob(x) for x in student_logp]
    if tail == "renormalise":
        t, s = [x / math.fsum(t) for x in t], [x / math.fsum(s) for x in s]
    if tail == "bucket":
        t, s = [*t, rest(t)], [*s, rest(s)]
    return gjs_of(t, s, beta)


def rest(p: Iterable[float]) -> float:
    return -math.expm1(min(math.log(math.fsum(p)), -1e-7))


def union_bins(own: Mapping[int, float], other: Mapping[int, float], floor: float) -> dict[int | str, float]:
    """Probabilities of one side over the union of ids and the bin "tail"."""
    p = {token: prob(logp) for token, logp in own.items()}
    mass = math.fsum(p.values())
    if mass > 1.0:
        p = {token: value / mass for token, value in p.items()}
        mass = 1.0
    left = max(1e-7, 1.0 - mass)
    missing = [token for token in other if token not in own]
    smallest = min(value for value in p.values() if value > 0.0)
    share = min(math.exp(floor), smallest, left / len(missing)) if missing else 0.0
    return {**p, **dict.fromkeys(missing, share), "tail": max(0.0, left - share * len(missing))}


def union_tail(teacher: Mapping[int, float], student: Mapping[int, float], beta: float, floor: float = -20.0) -> float:
    if not any(prob(x) > 0.0 for x in teacher.values()) or not any(prob(x) > 0.0 for x in student.values()):
        return NAN
    t, s = union_bins(teacher, student, floor), union_bins(student, teacher, floor)
    keys = sorted(t, key=str)
    return max(0.0, gjs_of([t[key] for key in keys], [s[key] for key in keys], beta))


def intersection_tail(teacher: Mapping[int, float], student: Mapping[int, float], beta: float) -> float:
    common = sorted(set(teacher) & set(student))
    t, s = [prob(teacher[token]) for token in common], [prob(student[token]) for token in common]
    t_rest, s_rest = max(1e-7, 1.0 - math.fsum(t)), max(1e-7, 1.0 - math.fsum(s))
    return max(0.0, gjs_of([*t, t_rest], [*s, s_rest], beta))


def floor_renormalised(
    teacher: Mapping[int, float], student: Mapping[int, float], beta: float, floor: float = -20.0
) -> float:
    union = sorted(set(teacher) | set(student))
    sides = []
    for side in (teacher, student):
        low = min(floor, *(x for x in side.values() if x > -math.inf))
        p = [prob(side.get(token, low)) for token in union]
        sides.append([x / math.fsum(p) for x in p])
    return max(0.0, gjs_of(sides[0], sides[1], beta))


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    return [w / math.fsum(weights) for w in weights]


def gjs_gradient(t: Sequence[float], s: Sequence[float], beta: float) -> list[float]:
    """d GJS / d student logits."""
    if beta == 0.0:
        return [b - a for a, b in zip(t, s, strict=True)]
    if beta == 1.0:
        ratios = [math.log(b / a) for a, b in zip(t, s, strict=True)]
    else:
        ratios = [math.log(b / (beta * a + (1.0 - beta) * b)) for a, b in zip(t, s, strict=True)]
    mean = math.fsum(b * r for b, r in zip(s, ratios, strict=True))
    return [(1.0 if beta == 1.0 else 1.0 - beta) * b * (r - mean) for b, r in zip(s, ratios, strict=True)]


def grad_log_softmax(s: Sequence[float], token: int) -> list[float]:
    """d log s(token) / d logits."""
    return [(1.0 if v == token else 0.0) - p for v, p in enumerate(s)]


def entropy(p: Sequence[float]) -> float:
    return -math.fsum(x * math.log(x) for x in p if x > 0.0)


def returns(advantages: Sequence[float], divergences: Sequence[float], gamma: float) -> list[float]:
    count = len(advantages)
    return [
        advantages[t] - math.fsum(gamma ** (j - t) * divergences[j] for j in range(t + 1, count)) for t in range(count)
    ]
