"""Tokens that each estimator needs to reach a given held-out KL(S||T), against sampled-token reverse KL.

The demo's tiny pair, its teacher in this process, K = 20, 768 tokens per step. Every arm's learning rate is chosen on
seeds (so prompts) of its own, as many trials each, by the area under the curve; a best rate at the grid's edge widens
the grid for all, and is refused if it stays there. Then every arm trains on the same seeds, live at staleness 0, and
ratios are paired: tokens to target of an arm over those of the reference with the same seed, with a 95 % t-interval of
the mean log ratio. A run that never arrives has no number and is counted.

    python benchmarks/bench_estimators.py [--quick] [--work build/estimators]    # the same --work continues
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from topkd.compose.compare import Comparison, compare
from topkd.compose.comparison.config import CompareConfig
from topkd.compose.progress import Progress

ARMS = [
    {"name": "scalar_kl", "set": {"k": 1, "objective": {"kind": "scalar_kl"}}},
    {"name": "gjs", "set": {"k": 1, "objective": {"kind": "gjs", "beta": 0.5}}},
    {"name": "topk_pg", "set": {"objective": {"kind": "topk_pg", "beta": 0.5, "lam": 0.3}}},
]


class Lines(Progress):
    """Plain lines: the runs take minutes."""

    def stage(self, name: str, total: int) -> None:
        print(f"== {name}: {total} runs", flush=True)

    def advance(self, done: int, detail: str = "") -> None:
        print(f"   {done:>3} {detail}", flush=True)


def settings(*, quick: bool) -> CompareConfig:
    steps, seeds, tuning = (30, [0, 1], [100]) if quick else (150, list(range(8)), [100, 101])
    return CompareConfig.model_validate(
        {
            "name": f"estimators{'-quick' if quick else ''}",
            "arms": ARMS,
            "seeds": seeds,
            "target": 0.92 if quick else 0.8,
            "overrides": {
                "steps": steps,
                "eval_every": max(1, steps // 15),
                "rollout": {"prompts_per_step": 32, "max_completion_tokens": 24, "batch_size": 32},
            },
            "tuning": {"rates": [3e-4, 1e-3, 3e-3], "seeds": tuning, "extensions": 2},
        }
    )


def show(done: Comparison) -> None:
    summary = done.summary
    print(f"\nheld-out KL(S||T) to {summary['target']:g} of its start, {len(summary['seeds'])} seeds, K = 20")
    print(
        f"{'arm':<14} {'lr':>8} {'final KL':>16} {'tokens to target':>17} {'of scalar (95 %)':>22} {'area ratio':>20}"
    )
    rates = {arm["name"]: arm["lr"] for arm in summary["arms"]}
    for row in summary["live"]["arms"]:
        final, tokens = row["final"], row["tokens_to_target"]
        never = f" ({row['censored']} never)" if row["censored"] else ""
        print(
            f"{row['arm']:<14} {rates[row['arm']]:>8.2g} {final['mean']:>8.3f} +- {final['sd'] or 0:.3f} "
            f"{('-' if tokens is None else f'{tokens:,.0f}') + never:>17} {shown(row['tokens_ratio']):>22} "
            f"{shown(row['area_ratio']):>20}"
        )
    for line in [summary["verdict"]["text"], *summary["refused"]]:
        print(line)


def shown(ratio: dict[str, float | None]) -> str:
    if ratio["ratio"] is None:
        return "-"
    spread = "" if ratio["low"] is None else f" ({ratio['low']:.2f}-{ratio['high']:.2f})"
    return f"{ratio['ratio']:.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes, nothing to quote")
    parser.add_argument("--work", type=Path, default=Path("build/estimators"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "estimators.json")
    args = parser.parse_args()
    work = args.work.with_name(args.work.name + "-quick") if args.quick else args.work
    done = compare(settings(quick=args.quick), work, Lines())
    show(done)
    if args.quick:
        return
    kept = {key: done.summary[key] for key in ("metric", "target", "seeds", "arms", "tuning", "refused", "failed")}
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
    record = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, **kept}
    args.out.write_text(json.dumps(record | {"live": done.summary["live"]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
