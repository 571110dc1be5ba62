"""F6: time and peak memory of the fused top-K loss against the dense computation and chunked forms, forward + backward.

Every measurement is a process of its own (peak memory = highest resident size above what it was once the inputs stood);
rounds interleave the sides, and each figure is the best of its rounds. On a shared machine compare the CPU seconds:
with one thread they are what the wall clock would show on an idle one.

"liger form" is Liger's way of chunking with the loss of the other sides, at two sizes of chunk. "liger package" is
liger-kernel's own chunked JSD with its own chunk (1,024 rows), where it is installed (``make bench-math`` puts it into
``.venv-liger``): it knows dense teachers only, so it gets one whose head is a single column and costs next to nothing.

    python benchmarks/bench_fused.py                 # the full size, minutes
    python benchmarks/bench_fused.py --rows 256 --vocab 8192 --hidden 128 --rounds 1
    python benchmarks/bench_fused.py --device cuda
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from topkd.topk.fused import topk_logprobs
from topkd.topk.losses.divergence import divergence
from topkd.topk.losses.sparse import bins, fused_divergence_loss
from topkd.topk.losses.teacher import SparseTeacher

BETA = 0.5
LIGER = Path(__file__).parents[1] / ".venv-liger"
RESULTS = Path(__file__).parent / "results" / "fused.json"


def rows_loss(logp: Tensor, rows: SparseTeacher) -> Tensor:
    return divergence(*bins(logp, rows, "bucket"), BETA).sum()


def dense_sum(hidden: Tensor, weight: Tensor, rows: SparseTeacher) -> Tensor:
    """What most trainers do: whole log-softmax in float32, then gather."""
    logp = torch.log_softmax((hidden @ weight.t()).float(), -1)
    return rows_loss(logp.gather(-1, rows.ids), rows)


def naive(hidden: Tensor, weight: Tensor, rows: SparseTeacher) -> Tensor:
    return dense_sum(hidden, weight, rows) / hidden.shape[0]


def checkpointed(hidden: Tensor, weight: Tensor, rows: SparseTeacher, size: int = 256) -> Tensor:
    parts = [
        checkpoint(dense_sum, hidden[i : i + size], weight, rows.rows(slice(i, i + size)), use_reentrant=False)
        for i in range(0, hidden.shape[0], size)
    ]
    return torch.stack(parts).sum() / hidden.shape[0]


class LigerForm(torch.autograd.Function):
    """The form of Liger's chunked losses: ``func.grad_and_value`` of a row chunk with respect to the *whole* head."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: SparseTeacher, size: int) -> Tensor:
        step = torch.func.grad_and_value(dense_sum, argnums=(0, 1))
        d_weight, d_hidden, total = torch.zeros_like(weight), [], torch.zeros((), device=hidden.device)
        for i in range(0, hidden.shape[0], size):
            (dh, dw), value = step(hidden[i : i + size], weight, rows.rows(slice(i, i + size)))
            d_weight.add_(dw)
            d_hidden.append(dh)
            total.add_(value)
        ctx.grads = torch.cat(d_hidden) / hidden.shape[0], d_weight.div_(hidden.shape[0])
        return total / hidden.shape[0]

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.grads[0] * scale, ctx.grads[1].mul_(scale), None, None


def liger_package(hidden: Tensor, weight: Tensor, rows: SparseTeacher) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=False)
    teacher_hidden = hidden.new_ones(hidden.shape[0], 1)
    teacher_weight = torch.linspace(-2, 2, weight.shape[0], dtype=weight.dtype, device=weight.device)[:, None]
    labels = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    return loss(hidden, weight, teacher_hidden, teacher_weight, labels)


def recompute(hidden: Tensor, weight: Tensor, rows: SparseTeacher) -> Tensor:
    return rows_loss(topk_logprobs(hidden, weight, rows.ids)[0], rows) / hidden.shape[0]


SIDES = {
    "naive dense": naive,
    "topkd fused": lambda h, w, r: fused_divergence_loss(h, w, r, beta=BETA),
    "topkd topk_logprobs": recompute,
    "topkd frozen head": lambda h, w, r: fused_divergence_loss(h, w.detach(), r, beta=BETA),
    "topkd renormalised": lambda h, w, r: fused_divergence_loss(h, w, r, beta=BETA, tail="renormalise"),
    "checkpoint 256": checkpointed,
    "liger form 16": lambda h, w, r: LigerForm.apply(h, w, r, 16),
    "liger form 256": lambda h, w, r: LigerForm.apply(h, w, r, 256),
}
sys.path.append(str(LIGER))
if importlib.util.find_spec("liger_kernel"):
    SIDES["liger package"] = liger_package


def inputs(a: argparse.Namespace) -> tuple[Tensor, Tensor, SparseTeacher]:
    torch.manual_seed(0)
    dtype, device = getattr(torch, a.dtype), torch.device(a.device)
    hidden = torch.randn(a.rows, a.hidden).to(dtype).to(device).requires_grad_()
    weight = torch.empty(a.vocab, a.hidden, dtype=dtype, device=device).normal_(std=0.6 * a.hidden**-0.5)
    ids = torch.randint(0, a.vocab // a.k, (a.rows, a.k)) + torch.arange(a.k) * (a.vocab // a.k)
    logp = torch.log_softmax(torch.randn(a.rows, a.k + 1) * 2, -1)
    order = logp[:, :-1].argsort(-1, descending=True)
    unknown = torch.full((a.rows,), -1)
    rows = SparseTeacher(
        ids.gather(1, order), logp[:, :-1].gather(1, order), logp[:, -1], unknown, torch.full((a.rows,), torch.nan)
    )
    moved = SparseTeacher(*(getattr(rows, n).to(device) for n in SparseTeacher.__dataclass_fields__))
    return hidden, weight.requires_grad_(), moved


def resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Vm") and "kB" in line}


def measure(a: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(a.threads)
    hidden, weight, rows = inputs(a)
    side = SIDES[a.side]
    warm = argparse.Namespace(**{**vars(a), "rows": 16, "vocab": 512, "hidden": 64, "k": 4})
    side(*inputs(warm)).backward()  # loads the kernels
    if a.device == "cuda":
        for _ in range(2):
            hidden.grad = weight.grad = None
            side(hidden, weight, rows).backward()
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # restarts VmHWM
        before = resident()["VmRSS"] * 1024
    began, busy = time.perf_counter(), time.process_time()
    loss = side(hidden, weight, rows)
    loss.backward()
    value = loss.item()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - busy
    peak = torch.cuda.max_memory_allocated() if a.device == "cuda" else resident()["VmHWM"] * 1024
    kept = 0 if weight.grad is None else weight.grad.nbytes
    norm = hidden.grad.double().norm().item()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "above_inputs_mb": (peak - before) / 1e6,
        "scratch_mb": (peak - before - kept) / 1e6,
        "loss": value,
        "grad_norm": norm,
    }


def table(a: argparse.Namespace) -> list[dict[str, Any]]:
    names = a.sides.split(",") if a.sides else list(SIDES)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for r in range(a.rounds):
        for dtype in a.dtypes.split(","):
            for name in names if r % 2 == 0 else names[::-1]:
                if r and name == "liger form 16":
                    continue  # the slowest by far, and far from any boundary
                command = [sys.executable, __file__, "--side", name, "--dtype", dtype, "--device", a.device]
                for option in ("rows", "hidden", "vocab", "k", "threads"):
                    command += [f"--{option}", str(getattr(a, option))]
                env = {**os.environ, "OMP_NUM_THREADS": str(a.threads)}
                done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                found.setdefault((dtype, name), []).append(json.loads(done.stdout))
    out = []
    for (dtype, name), runs in found.items():
        best = {key: min(run[key] for run in runs) for key in runs[0]}
        out.append(
            {
                "dtype": dtype,
                "side": name,
                **best,
                "rounds": [run["seconds"] for run in runs],
                "cpu_rounds": [run["cpu_seconds"] for run in runs],
            }
        )
    return out


def report(rows: list[dict[str, Any]]) -> str:
    title = (
        f"{'dtype':9} {'side':20} {'above inputs MB':>16} {'scratch MB':>11} {'s':>8} {'CPU s':>8} {'/naive MB':>10}"
    )
    lines = [f"{title} {'/naive CPU s':>13}"]
    for row in rows:
        base = next(r for r in rows if r["dtype"] == row["dtype"] and r["side"] == "naive dense")
        lines.append(
            f"{row['dtype']:9} {row['side']:20} {row['above_inputs_mb']:16.0f} {row['scratch_mb']:11.0f} "
            f"{row['seconds']:8.3f} {row['cpu_seconds']:8.3f} {row['scratch_mb'] / base['scratch_mb']:10.3f} "
            f"{row['cpu_seconds'] / base['cpu_seconds']:13.2f}"
        )
    return "\n".join(lines)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores, shared"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("rows", 2048),
        ("hidden", 1024),
        ("vocab", 151_936),
        ("k", 64),
        ("threads", 1),
        ("rounds", 2),
    ):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--dtypes", default="bfloat16,float32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--sides", default="", help="comma-separated; all when empty")
    p.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    p.add_argument("--dtype", help=argparse.SUPPRESS)
    p.add_argument("--out", type=Path, default=None, help=f"{RESULTS} for the full size")
    a = p.parse_args()
    if a.side:
        print(json.dumps(measure(a)))
        return
    rows = table(a)
    print(report(rows))
    size = {name: getattr(a, name) for name in ("rows", "hidden", "vocab", "k", "threads")}
    out = a.out or (RESULTS if size["vocab"] == 151_936 and not a.sides else None)
    if out is not None:
        out.parent.mkdir(exist_ok=True)
        facts = {"machine": machine(a.device), "torch": torch.__version__, "size": size, "results": rows}
        out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
