"""Breaks each formula of ``topkd.topk`` in turn and shows that a test fails.

A mutation is one replacement in one source file. Each is applied to a temporary copy of the package and its tests, the
named tests run there, and a mutation that they let pass is a survivor: the command then fails. A mutation whose old
text is not in the file exactly once is an error, so the list cannot rot unseen.

    python scripts/mutate_maths.py                 all of them (minutes)
    python scripts/mutate_maths.py --only union    those whose name or file contains "union"
    python scripts/mutate_maths.py --list
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _numpy(name: str, module: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(name, f"topkd/topk/{module}.py", old, new, tuple(f"tests/topk/test_{test}.py" for test in tests))


NUMPY = (
    _numpy(
        "advantage: sign flipped",
        "advantages",
        "np.asarray((1.0 - beta) * np.where(",
        "np.asarray(-(1.0 - beta) * np.where(",
        "advantages",
    ),
    _numpy(
        "advantage: teacher's weight in front",
        "advantages",
        "np.asarray((1.0 - beta) * np.where(",
        "np.asarray(beta * np.where(",
        "advantages",
    ),
    _numpy(
        "advantage: weights of the mixture swapped near zero",
        "advantages",
        "near = np.log1p(beta * np.expm1(",
        "near = np.log1p((1.0 - beta) * np.expm1(",
        "advantages",
    ),
    _numpy(
        "advantage: weights of the mixture swapped far out",
        "advantages",
        "far = np.logaddexp(np.log(beta) + difference, np.log1p(-beta))",
        "far = np.logaddexp(np.log1p(-beta) + difference, np.log(beta))",
        "advantages",
    ),
    _numpy(
        "advantage: student minus teacher",
        "advantages",
        "np.nan, teacher - student)",
        "np.nan, student - teacher)",
        "advantages",
    ),
    _numpy(
        "advantage: forward KL forgets the minus one",
        "advantages",
        "return np.asarray(np.expm1(difference))",
        "return np.asarray(np.exp(difference))",
        "advantages",
    ),
    _numpy(
        "advantage: a ruled-out token at reverse KL is minus infinity",
        "advantages",
        "return np.where(np.isneginf(difference), np.nan, difference)",
        "return difference",
        "advantages",
    ),
    _numpy(
        "divergence: forward and reverse KL exchanged",
        "divergence",
        "    if beta == 0.0:\n        return kl_terms(teacher, student)",
        "    if beta == 0.0:\n        return kl_terms(student, teacher)",
        "divergence",
    ),
    _numpy(
        "divergence: reverse KL points forward",
        "divergence",
        "    if beta == 1.0:\n        return kl_terms(student, teacher)",
        "    if beta == 1.0:\n        return kl_terms(teacher, student)",
        "divergence",
    ),
    _numpy(
        "divergence: the interior weights exchanged",
        "divergence",
        "return beta * kl_terms(teacher, mixture) + (1.0 - beta) * kl_terms(student, mixture)",
        "return (1.0 - beta) * kl_terms(teacher, mixture) + beta * kl_terms(student, mixture)",
        "divergence",
    ),
    _numpy(
        "divergence: the mixture weights exchanged",
        "divergence",
        "np.logaddexp(teacher + np.log(beta), student + np.log1p(-beta))",
        "np.logaddexp(teacher + np.log1p(-beta), student + np.log(beta))",
        "divergence",
    ),
    _numpy(
        "divergence: the tail bucket is lost",
        "divergence",
        "total = total + integrand(log_tail(teacher), log_tail(student), beta)",
        "total = total + 0.0 * integrand(log_tail(teacher), log_tail(student), beta)",
        "divergence",
    ),
    _numpy(
        "divergence: 0 log 0 unguarded",
        "divergence",
        "return np.where(empty, 0.0, np.exp(logp) * (logp - logq))",
        "return np.where(empty & False, 0.0, np.exp(logp) * (logp - logq))",
        "divergence",
    ),
    _numpy(
        "divergence: no signal becomes zero",
        "divergence",
        "return np.where(silent, np.nan, total)",
        "return np.where(silent, 0.0, total)",
        "divergence",
    ),
    _numpy(
        "divergence: renormalise one side only",
        "divergence",
        "student - log_mass(student)[..., None]",
        "student",
        "divergence",
    ),
    _numpy("mass: the tail clamp is gone", "mass", "np.minimum(log_mass(logp), clamp)", "log_mass(logp)", "traps"),
    _numpy(
        "pairs: a missing id takes nothing from the tail",
        "pairs",
        "np.maximum(remaining - share * count, 0.0)",
        "np.maximum(remaining, 0.0)",
        "pairs",
        "goldens",
    ),
    _numpy(
        "pairs: the share ignores the smallest listed probability",
        "pairs",
        "np.minimum(np.minimum(np.exp(floor), smallest), remaining / np.maximum(count, 1))",
        "np.minimum(np.exp(floor), remaining / np.maximum(count, 1))",
        "pairs",
    ),
    _numpy(
        "pairs: the share ignores what is left over",
        "pairs",
        "np.minimum(np.minimum(np.exp(floor), smallest), remaining / np.maximum(count, 1))",
        "np.minimum(np.exp(floor), smallest)",
        "pairs",
        "goldens",
    ),
    _numpy(
        "pairs: the stored tail is ignored",
        "pairs",
        "teacher_tail=np.exp(teacher.tail_logp, dtype=np.float64),",
        "teacher_tail=np.full(teacher.rows, np.nan),",
        "pairs",
    ),
    _numpy(
        "pairs: the floor is not capped",
        "pairs",
        "np.minimum(floor, smallest)[:, None]",
        "np.full_like(smallest, floor)[:, None]",
        "pairs",
        "goldens",
    ),
    _numpy(
        "alignment: a pair is any two neighbours",
        "alignment",
        "((keys[:, 1:] ^ keys[:, :-1]) == 1)",
        "((keys[:, 1:] - keys[:, :-1]) == 1)",
        "pairs",
        "compat",
    ),
    _numpy(
        "union: the second slot of a pair is counted again",
        "union",
        "np.subtract(np.float32(1.0), same, out=same)",
        "same.fill(np.float32(1.0))",
        "pairs",
    ),
    _numpy(
        "union: one pair too few between rows is allowed",
        "union",
        "equal[:, 0] = False",
        "equal[:, 0] |= False",
        "pairs",
    ),
    _numpy(
        "union: both shares stay in a pair",
        "union",
        "np.subtract(mixed, shares * np.float32(1 - 1e-6), out=log)",
        "np.subtract(mixed, shares * np.float32(0.0), out=log)",
        "pairs",
    ),
    _numpy(
        "union: the mixture's own scale is lost",
        "union",
        "total -= np.log(scale) * mixture_mass",
        "total -= 0.0",
        "pairs",
    ),
    _numpy("union: the tail of the mixture is lost", "union", " + _x_log_x(mixture_tail)", "", "pairs"),
    _numpy(
        "estimator: the offset is taken from the tail alone",
        "estimator",
        "weighted_advantage(at_ids, student, beta) - np.exp(student) * baseline[:, None]",
        "weighted_advantage(at_ids, student, beta)",
        "estimator",
    ),
    _numpy(
        "estimator: the sampled term has no offset",
        "estimator",
        "(advantage64(difference, beta) - baseline)",
        "advantage64(difference, beta)",
        "estimator",
    ),
    _numpy(
        "estimator: the importance ratio is lost",
        "estimator",
        "tail = lam * ratio * (",
        "tail = lam * (",
        "estimator",
    ),
    _numpy("estimator: lambda is lost", "estimator", "tail = lam * ratio * (", "tail = ratio * (", "estimator"),
    _numpy(
        "estimator: a listed token is sampled too",
        "estimator",
        "np.where(inside | gated | (lam == 0.0), 0.0, tail)",
        "np.where(gated | (lam == 0.0), 0.0, tail)",
        "estimator",
    ),
    _numpy(
        "estimator: the tails are exchanged",
        "estimator",
        "np.log(teacher_tail) - np.log(student_tail)",
        "np.log(student_tail) - np.log(teacher_tail)",
        "estimator",
    ),
    _numpy(
        "estimator: nothing is gated",
        "estimator",
        "EMPTY_TAIL = 1e-6",
        "EMPTY_TAIL = 0.0",
        "estimator",
    ),
    _numpy(
        "returns: the own step's divergence is included",
        "baselines",
        "_following(_discounted_sums(-values, gamma, left), left)",
        "_discounted_sums(-values, gamma, left)",
        "baselines",
    ),
    _numpy(
        "returns: divergences are rewards",
        "baselines",
        "_discounted_sums(-values, gamma, left)",
        "_discounted_sums(values, gamma, left)",
        "baselines",
    ),
    _numpy(
        "baseline: of the other sign",
        "baselines",
        "np.minimum(-(1.0 - beta) * terms.sum(axis=-1), 0.0)",
        "np.maximum((1.0 - beta) * terms.sum(axis=-1), 0.0)",
        "baselines",
    ),
    _numpy(
        "entropy: the rest is spread over the whole vocabulary",
        "entropy",
        "others = vocab_size - count",
        "others = vocab_size - 0 * count",
        "baselines",
    ),
    _numpy(
        "entropy: the rest is forgotten",
        "entropy",
        "low = np.maximum(head + lump, 0.0)",
        "low = np.maximum(head, 0.0)",
        "baselines",
    ),
    _numpy(
        "k3: the difference reversed",
        "kl_estimates",
        "np.nan, reference - student)",
        "np.nan, student - reference)",
        "advantages",
    ),
    _numpy(
        "k1: of the other sign",
        "kl_estimates",
        "np.nan, student - reference)",
        "np.nan, reference - student)",
        "advantages",
    ),
    _numpy(
        "compat: an empty list is zero divergence",
        "compat",
        "np.where(pair.signal, np.maximum(total, 0.0), np.nan)",
        "np.where(pair.signal, np.maximum(total, 0.0), 0.0)",
        "compat",
    ),
    _numpy(
        "compat: off by one",
        "compat",
        "full[prompt_len : prompt_len + completion_len]",
        "full[prompt_len - 1 : prompt_len - 1 + completion_len]",
        "compat",
    ),
    _numpy(
        "types: a cut list forgets the mass it drops",
        "types",
        "dropped = np.exp(logp[:, k:], dtype=np.float64).sum(axis=1) + np.exp(tail, dtype=np.float64)",
        "dropped = np.exp(tail, dtype=np.float64)",
        "types",
    ),
    _numpy(
        "samples: the teacher's rows may start anywhere",
        "samples",
        "    if topk.start != start:",
        "    if topk.start != start and topk.rows < 0:",
        "samples",
    ),
)

# The losses on logits: each (file, old, new, tests) as above, with whole paths.
TORCH: tuple[Mutation, ...] = ()

MUTATIONS = NUMPY + TORCH


def _copy(target: Path) -> None:
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis")
    shutil.copytree(ROOT / "topkd", target / "topkd", ignore=skip)
    (target / "tests").mkdir()
    for name in ("topk", "golden"):
        shutil.copytree(ROOT / "tests" / name, target / "tests" / name, ignore=skip)
    shutil.copy(ROOT / "tests" / "__init__.py", target / "tests")
    shutil.copy(ROOT / "pyproject.toml", target)


def _run(folder: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *tests,
    ]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode not in (0, 1):
        raise SystemExit(
            f"pytest could not run {' '.join(tests)} (exit {done.returncode}):\n{done.stdout}{done.stderr}"
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, failed[0] if failed else ""


def _mutated(source: str, mutation: Mutation) -> str:
    found = source.count(mutation.old)
    if found != 1:
        raise SystemExit(f"{mutation.name}: the old text stands {found} times in {mutation.file}, expected once")
    return source.replace(mutation.old, mutation.new)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose name or file contains this")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTATIONS if options.only in m.name or options.only in m.file]
    for mutation in chosen:  # before any time is spent: every old text must still be there
        _mutated((ROOT / mutation.file).read_text(encoding="utf-8"), mutation)
    if options.list:
        print("\n".join(f"{mutation.file}: {mutation.name}" for mutation in chosen))
        return 0
    survivors = []
    with tempfile.TemporaryDirectory(prefix="topkd-mutants-") as name:
        folder = Path(name)
        _copy(folder)
        for tests in sorted({mutation.tests for mutation in chosen}):
            passed, failure = _run(folder, tests)
            if not passed:
                raise SystemExit(f"the tests fail without any mutation: {failure}")
        for mutation in chosen:
            path = folder / mutation.file
            source = path.read_text(encoding="utf-8")
            path.write_text(_mutated(source, mutation), encoding="utf-8")
            start = time.perf_counter()
            survived, failure = _run(folder, mutation.tests)
            path.write_text(source, encoding="utf-8")
            print(
                f"{'SURVIVED' if survived else 'killed':8} {time.perf_counter() - start:5.1f} s  {mutation.name}"
                f"{'' if survived else '  <- ' + failure.split(' - ')[0].removeprefix('FAILED ')}",
                flush=True,
            )
            if survived:
                survivors.append(mutation.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
