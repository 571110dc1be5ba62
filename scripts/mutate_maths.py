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


def _maths(name: str, module: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(name, f"topkd/topk/{module}.py", old, new, tuple(f"tests/topk/test_{test}.py" for test in tests))


NUMPY = (
    _maths(
        "advantage: sign flipped",
        "advantages",
        "np.asarray((1.0 - beta) * np.where(",
        "np.asarray(-(1.0 - beta) * np.where(",
        "advantages",
    ),
    _maths(
        "advantage: teacher's weight in front",
        "advantages",
        "np.asarray((1.0 - beta) * np.where(",
        "np.asarray(beta * np.where(",
        "advantages",
    ),
    _maths(
        "advantage: weights of the mixture swapped near zero",
        "advantages",
        "near = np.log1p(beta * np.expm1(",
        "near = np.log1p((1.0 - beta) * np.expm1(",
        "advantages",
    ),
    _maths(
        "advantage: weights of the mixture swapped far out",
        "advantages",
        "far = np.logaddexp(np.log(beta) + difference, np.log1p(-beta))",
        "far = np.logaddexp(np.log1p(-beta) + difference, np.log(beta))",
        "advantages",
    ),
    _maths(
        "advantage: student minus teacher",
        "advantages",
        "np.nan, teacher - student)",
        "np.nan, student - teacher)",
        "advantages",
    ),
    _maths(
        "advantage: forward KL forgets the minus one",
        "advantages",
        "return np.asarray(np.expm1(difference))",
        "return np.asarray(np.exp(difference))",
        "advantages",
    ),
    _maths(
        "advantage: a ruled-out token at reverse KL is minus infinity",
        "advantages",
        "return np.where(np.isneginf(difference), np.nan, difference)",
        "return difference",
        "advantages",
    ),
    _maths(
        "divergence: forward and reverse KL exchanged",
        "divergence",
        "    if beta == 0.0:\n        return kl_terms(teacher, student)",
        "    if beta == 0.0:\n        return kl_terms(student, teacher)",
        "divergence",
    ),
    _maths(
        "divergence: reverse KL points forward",
        "divergence",
        "    if beta == 1.0:\n        return kl_terms(student, teacher)",
        "    if beta == 1.0:\n        return kl_terms(teacher, student)",
        "divergence",
    ),
    _maths(
        "divergence: the interior weights exchanged",
        "divergence",
        "return beta * kl_terms(teacher, mixture) + (1.0 - beta) * kl_terms(student, mixture)",
        "return (1.0 - beta) * kl_terms(teacher, mixture) + beta * kl_terms(student, mixture)",
        "divergence",
    ),
    _maths(
        "divergence: the mixture weights exchanged",
        "divergence",
        "np.logaddexp(teacher + np.log(beta), student + np.log1p(-beta))",
        "np.logaddexp(teacher + np.log1p(-beta), student + np.log(beta))",
        "divergence",
    ),
    _maths(
        "divergence: the tail bucket is lost",
        "divergence",
        "total = total + integrand(log_tail(teacher), log_tail(student), beta)",
        "total = total + 0.0 * integrand(log_tail(teacher), log_tail(student), beta)",
        "divergence",
    ),
    _maths(
        "divergence: 0 log 0 unguarded",
        "divergence",
        "return np.where(empty, 0.0, np.exp(logp) * (logp - logq))",
        "return np.where(empty & False, 0.0, np.exp(logp) * (logp - logq))",
        "divergence",
    ),
    _maths(
        "divergence: no signal becomes zero",
        "divergence",
        "return np.where(silent, np.nan, total)",
        "return np.where(silent, 0.0, total)",
        "divergence",
    ),
    _maths(
        "divergence: renormalise one side only",
        "divergence",
        "student - log_mass(student)[..., None]",
        "student",
        "divergence",
    ),
    _maths("mass: the tail clamp is gone", "mass", "np.minimum(log_mass(logp), clamp)", "log_mass(logp)", "traps"),
    _maths(
        "pairs: a missing id takes nothing from the tail",
        "pairs",
        "0.0, remaining - share * count)",
        "0.0, remaining)",
        "pairs",
        "goldens",
    ),
    _maths(
        "pairs: the share ignores the smallest listed probability",
        "pairs",
        "np.minimum(np.minimum(np.exp(floor), smallest), remaining / np.maximum(count, 1))",
        "np.minimum(np.exp(floor), remaining / np.maximum(count, 1))",
        "pairs",
    ),
    _maths(
        "pairs: the share ignores what is left over",
        "pairs",
        "np.minimum(np.minimum(np.exp(floor), smallest), remaining / np.maximum(count, 1))",
        "np.minimum(np.exp(floor), smallest)",
        "pairs",
        "goldens",
    ),
    _maths(
        "pairs: the stored tail is ignored",
        "pairs",
        "teacher_tail=np.exp(teacher.tail_logp, dtype=np.float64),",
        "teacher_tail=np.full(teacher.rows, np.nan),",
        "pairs",
    ),
    _maths(
        "pairs: the floor is not capped",
        "pairs",
        "np.minimum(floor, smallest)[:, None]",
        "np.full_like(smallest, floor)[:, None]",
        "pairs",
        "goldens",
    ),
    _maths(
        "alignment: a pair is any two neighbours",
        "alignment",
        "((keys[:, 1:] ^ keys[:, :-1]) == 1)",
        "((keys[:, 1:] - keys[:, :-1]) == 1)",
        "pairs",
        "compat",
    ),
    _maths(
        "union: the second slot of a pair is counted again",
        "union",
        "np.maximum(mixed, same, out=mixed)",
        "np.maximum(mixed, 0.0, out=mixed)",
        "pairs",
    ),
    _maths(
        "union: one pair too few between rows is allowed",
        "union",
        "block.equal[:, 0] = False",
        "block.equal[:, 0] |= False",
        "pairs",
    ),
    _maths(
        "union: both shares stay in a pair",
        "union",
        "np.subtract(mixed, shares * np.float32(1 - 1e-6), out=second)",
        "np.subtract(mixed, shares * np.float32(0.0), out=second)",
        "pairs",
    ),
    _maths(
        "union: the mixture's own scale is lost",
        "union",
        "total -= np.log(teacher.scale) * mixture_mass",
        "total -= 0.0",
        "pairs",
    ),
    _maths(
        "union: rows below the floor get its share", "union", "if logp[:, -1].min() >= side.floor:", "if True:", "pairs"
    ),
    _maths(
        "union: an id that does not fit into a key is cut", "union", "if ids.max() > self.max_id:", "if False:", "pairs"
    ),
    _maths("union: the tail of the mixture is lost", "union", " + _x_log_x(mixture_tail)", "", "pairs"),
    _maths(
        "estimator: the offset is taken from the tail alone",
        "estimator",
        "weighted_advantage(at_ids, student, beta) - np.exp(student) * baseline[:, None]",
        "weighted_advantage(at_ids, student, beta)",
        "estimator",
    ),
    _maths(
        "estimator: the sampled term has no offset",
        "estimator",
        "(advantage64(difference, beta) - baseline)",
        "advantage64(difference, beta)",
        "estimator",
    ),
    _maths(
        "estimator: the importance ratio is lost",
        "estimator",
        "tail = lam * ratio * (",
        "tail = lam * (",
        "estimator",
    ),
    _maths("estimator: lambda is lost", "estimator", "tail = lam * ratio * (", "tail = ratio * (", "estimator"),
    _maths(
        "estimator: a listed token is sampled too",
        "estimator",
        "np.where(inside | gated | (lam == 0.0), 0.0, tail)",
        "np.where(gated | (lam == 0.0), 0.0, tail)",
        "estimator",
    ),
    _maths(
        "estimator: the tails are exchanged",
        "estimator",
        "np.log(teacher_tail) - np.log(student_tail)",
        "np.log(student_tail) - np.log(teacher_tail)",
        "estimator",
    ),
    _maths(
        "estimator: nothing is gated",
        "estimator",
        "EMPTY_TAIL = 1e-6",
        "EMPTY_TAIL = 0.0",
        "estimator",
    ),
    _maths(
        "returns: the own step's divergence is included",
        "baselines",
        "_following(_discounted_sums(-values, gamma, left), left)",
        "_discounted_sums(-values, gamma, left)",
        "baselines",
    ),
    _maths(
        "returns: divergences are rewards",
        "baselines",
        "_discounted_sums(-values, gamma, left)",
        "_discounted_sums(values, gamma, left)",
        "baselines",
    ),
    _maths(
        "baseline: of the other sign",
        "baselines",
        "np.minimum(-(1.0 - beta) * terms.sum(axis=-1), 0.0)",
        "np.maximum((1.0 - beta) * terms.sum(axis=-1), 0.0)",
        "baselines",
    ),
    _maths(
        "entropy: the rest is spread over the whole vocabulary",
        "entropy",
        "others = vocab_size - count",
        "others = vocab_size - 0 * count",
        "baselines",
    ),
    _maths(
        "entropy: the rest is forgotten",
        "entropy",
        "low = np.maximum(head + lump, 0.0)",
        "low = np.maximum(head, 0.0)",
        "baselines",
    ),
    _maths(
        "k3: the difference reversed",
        "kl_estimates",
        "np.nan, reference - student)",
        "np.nan, student - reference)",
        "advantages",
    ),
    _maths(
        "k1: of the other sign",
        "kl_estimates",
        "np.nan, student - reference)",
        "np.nan, reference - student)",
        "advantages",
    ),
    _maths(
        "compat: an empty list is zero divergence",
        "compat",
        "np.where(pair.signal, np.maximum(total, 0.0), np.nan)",
        "np.where(pair.signal, np.maximum(total, 0.0), 0.0)",
        "compat",
    ),
    _maths(
        "compat: off by one",
        "compat",
        "full[prompt_len : prompt_len + completion_len]",
        "full[prompt_len - 1 : prompt_len - 1 + completion_len]",
        "compat",
    ),
    _maths(
        "types: a cut list forgets the mass it drops",
        "types",
        "dropped = np.exp(logp[:, k:], dtype=np.float64).sum(axis=1) + np.exp(tail, dtype=np.float64)",
        "dropped = np.exp(tail, dtype=np.float64)",
        "types",
    ),
    _maths(
        "samples: the teacher's rows may start anywhere",
        "samples",
        "    if topk.start != start:",
        "    if topk.start != start and topk.rows < 0:",
        "samples",
    ),
)

TORCH = (
    _maths(
        "importance sampling: the ratio is not detached",
        "losses/policy",
        "log_ratio = (logp_new - logp_behavior).detach()",
        "log_ratio = logp_new - logp_behavior",
        "losses_policy",
    ),
    _maths(
        "importance sampling: of the other sign",
        "losses/policy",
        'values = -(ratio.clamp(max=_positive("cap", cap)) * advantage * _tracked(new))',
        'values = ratio.clamp(max=_positive("cap", cap)) * advantage * _tracked(new)',
        "losses_policy",
    ),
    _maths(
        "importance sampling: the ratio upside down",
        "losses/policy",
        "log_ratio = (logp_new - logp_behavior).detach()",
        "log_ratio = (logp_behavior - logp_new).detach()",
        "losses_policy",
    ),
    _maths(
        "importance sampling: advantages carry a gradient",
        "losses/policy",
        "advantages.detach()[valid]",
        "advantages[valid]",
        "losses_policy",
    ),
    _maths(
        "ppo: the minimum of the two losses",
        "losses/policy",
        "values = torch.maximum(-advantage * ratio,",
        "values = torch.minimum(-advantage * ratio,",
        "losses_policy",
    ),
    _maths(
        "jsd: forward and reverse KL exchanged",
        "losses/divergence",
        "    if beta == 0.0:\n        return torch.where(teacher_has",
        "    if beta == -1.0:\n        return torch.where(teacher_has",
        "goldens_torch",
    ),
    _maths(
        "jsd: the interior weights exchanged",
        "losses/divergence",
        "terms = beta * t * (lt - log_m) + (1.0 - beta) * s * (ls - log_m)",
        "terms = (1.0 - beta) * t * (lt - log_m) + beta * s * (ls - log_m)",
        "goldens_torch",
    ),
    _maths(
        "jsd: the teacher receives a gradient and the student none",
        "losses/divergence",
        "    teacher_logp = teacher_logp.detach()",
        "    student_logp = student_logp.detach()",
        "goldens_torch",
    ),
    _maths(
        "jsd: temperature on one side only",
        "losses/jsd",
        "_on_support(student / temperature, teacher / temperature, top_k, tail)",
        "_on_support(student / temperature, teacher, top_k, tail)",
        "goldens_torch",
    ),
    _maths(
        "jsd: token_clip after the sum",
        "losses/jsd",
        "terms.clamp(max=token_clip).sum(-1)",
        "terms.sum(-1).clamp(max=token_clip)",
        "goldens_torch",
        "traps_torch",
    ),
    _maths(
        "top-K policy gradient: no offset at the listed ids",
        "losses/topk_policy",
        "head - s * g_o[:, None], 0.0)",
        "head, 0.0)",
        "losses_topk_policy",
    ),
    _maths(
        "top-K policy gradient: an id without student probability weighs nothing at forward KL",
        "losses/topk_policy",
        "torch.where(member if beta == 0.0 else used, head",
        "torch.where(used, head",
        "losses_topk_policy_edges",
    ),
    _maths(
        "fused: dW stays in half precision however many chunks there are",
        "fused/blocks",
        "and chunks > MOST_HALF_SUMS",
        "and chunks < 0",
        "fused_precision",
    ),
    _maths(
        "fused: a common id's dW is summed in half precision",
        "fused/subset",
        "if weight.dtype == wide:",
        "if True:",
        "fused_precision",
    ),
    _maths(
        "fused: the slope of the normaliser is lost",
        "fused/functions",
        "scale = (-coefficient.sum(-1) / mass)",
        "scale = (-coefficient.sum(-1) * 0.0)",
        "fused",
    ),
    _maths(
        "top-K policy gradient: no offset in the sampled term",
        "losses/topk_policy",
        "lam * (g_y - g_o)",
        "lam * g_y",
        "losses_topk_policy",
    ),
    _maths(
        "top-K policy gradient: a listed token is sampled too",
        "losses/topk_policy",
        "outside = ~in_support & ~gated",
        "outside = ~gated",
        "losses_topk_policy",
    ),
    _maths(
        "top-K policy gradient: of the other sign",
        "losses/topk_policy",
        "return -((weights.ids.to(dtype) * at_ids)",
        "return ((weights.ids.to(dtype) * at_ids)",
        "losses_topk_policy",
    ),
    _maths(
        "taid: the legs exchanged",
        "losses/taid",
        "return (1.0 - t) * student + t * teacher",
        "return t * student + (1.0 - t) * teacher",
        "twins",
    ),
    _maths(
        "taid: the target carries a gradient",
        "losses/taid",
        "(student.detach(), select_rows(teacher_logits",
        "(student, select_rows(teacher_logits",
        "goldens_torch",
    ),
    _maths(
        "taid schedule: a rising loss speeds it up",
        "schedule",
        "change = (float(previous) - float(value))",
        "change = (float(value) - float(previous))",
        "goldens_torch",
        "schedule",
    ),
    _maths(
        "kd: shifted by default",
        "losses/kd",
        "logits[..., :-1, :], teacher_logits[..., :-1, :], label[..., 1:]",
        "logits[..., 1:, :], teacher_logits[..., 1:, :], label[..., 1:]",
        "traps_torch",
    ),
)

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
