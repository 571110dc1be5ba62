"""Curves of a run as PNG files (matplotlib, imported only here and only when drawn)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"  # told apart with every kind of colour vision


def write_demo_curve(evals: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draw exact held-out divergences with the noisy training estimate, and agreement, against steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), dpi=120, layout="constrained")
    at = [record["step"] for record in evals]
    left.plot(at, [record["reverse_kl"] for record in evals], "-o", color=BLUE, label="KL(student || teacher)")
    left.plot(at, [record["forward_kl"] for record in evals], "-s", color=ORANGE, label="KL(teacher || student)")
    estimate = [(record["step"], record["kl_k1"]) for record in steps if record.get("kl_k1") is not None]
    if estimate:
        left.plot(*zip(*estimate, strict=True), color=GREY, lw=0.8, alpha=0.6, label="estimate on fresh rollouts (k1)")
    left.set(xlabel="step", ylabel="nats per token", title="held-out divergence (exact, full vocabulary)")
    left.set_ylim(bottom=min([0.0, *(value for _, value in estimate)]))
    left.legend(frameon=False, fontsize=8)
    right.plot(at, [100 * record["agreement"] for record in evals], "-o", color=BLUE)
    right.set(xlabel="step", ylabel="% of positions", title="same most likely next token")
    right.set_ylim(bottom=0.0)
    for axis in (left, right):
        axis.grid(color="#e5e5e5", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    plt.close(figure)
    return path
