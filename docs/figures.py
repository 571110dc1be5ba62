"""Draws the two pictures of docs/math.md: ``python docs/figures.py [--only bias|curves] [--steps N]``.

``bias`` enumerates every token of a toy vocabulary exactly; ``curves`` runs the demo's student and teacher (no server)
once per estimator and keeps its numbers beside the picture.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import numpy as np

from topkd.topk import gjs_advantage

HERE = Path(__file__).resolve().parent
IMAGES = HERE / "img"
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000"]
BETA = 0.5


def toy(rng: np.random.Generator, vocab: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """log t and log s of one position: correlated Gaussian logits."""
    shared, own = rng.normal(size=(2, vocab)) * 2.5
    student = 0.8 * shared + 0.6 * own
    return shared - np.logaddexp.reduce(shared), student - np.logaddexp.reduce(student)


def estimates(lt: np.ndarray, ls: np.ndarray, k: int, lam: float) -> np.ndarray:
    """Row y is the estimator's gradient with respect to the student's logits when token y was sampled, [V, V]."""
    s, g = np.exp(ls), gjs_advantage(lt, ls, BETA)
    listed = np.zeros(len(lt), dtype=bool)
    listed[np.argsort(-lt)[:k]] = True
    t_o, s_o = np.exp(lt[~listed]).sum(), s[~listed].sum()
    g_o = float(gjs_advantage(np.log(t_o), np.log(s_o), BETA)) if k else 0.0
    weights = np.where(listed, s * (g - g_o), 0.0)
    sampled = np.where(listed, 0.0, lam * (g - g_o))
    constant = weights - s * weights.sum()
    return constant[None] + sampled[:, None] * (np.eye(len(lt)) - s[None])


def draw_bias() -> None:
    """Relative bias and standard deviation of the gradient against K for three lambdas, over toy positions."""
    plt = pyplot()
    ks = [0, 1, 2, 5, 10, 20, 50, 100, 200]
    rng = np.random.default_rng(0)
    positions = [toy(rng) for _ in range(40)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), dpi=120, layout="constrained")
    for lam, colour in zip((1.0, 0.3, 0.0), COLOURS, strict=False):
        bias, spread = [], []
        for k in ks:
            facts = []
            for lt, ls in positions:
                s, rows = np.exp(ls), estimates(lt, ls, k, lam)
                exact = s * (gjs_advantage(lt, ls, BETA) - (s * gjs_advantage(lt, ls, BETA)).sum())
                mean = s @ rows
                scale = np.linalg.norm(exact)
                variance = (s[:, None] * (rows - mean) ** 2).sum()
                facts.append((np.linalg.norm(mean - exact) / scale, np.sqrt(variance) / scale))
            bias.append(np.mean([fact[0] for fact in facts]))
            spread.append(np.mean([fact[1] for fact in facts]))
        left.plot(ks, bias, "-o", ms=4, color=colour, label=f"lam = {lam:g}")
        right.plot(ks, spread, "-o", ms=4, color=colour, label=f"lam = {lam:g}")
    left.set(title="bias: |E[G] + grad D| / |grad D|", xlabel="K (teacher's list; 0 = sampled token only)")
    right.set(title="noise of one sample: sd(G) / |grad D|", xlabel="K (teacher's list; 0 = sampled token only)")
    for axis in (left, right):
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.set_ylim(bottom=-0.02)
    finish(plt, figure, (left, right), "estimator.png")


def draw_curves(steps: int, seed: int) -> None:
    """Exact held-out divergence of the demo's student under each estimator: same seed, batch and learning rate."""
    from topkd.engine.config.objectives import GJS, ScalarKL, TopKPolicyGradient

    runs = {
        "scalar reverse KL": (ScalarKL(), 20),
        "GJS, sampled token": (GJS(beta=BETA), 20),
        "top-K, lam 0 (tail bucket)": (TopKPolicyGradient(beta=BETA, lam=0.0), 20),
        "top-K, lam 0.3 (default)": (TopKPolicyGradient(beta=BETA, lam=0.3), 20),
        "top-K, lam 1": (TopKPolicyGradient(beta=BETA, lam=1.0), 20),
        "dense (K = V)": (TopKPolicyGradient(beta=BETA, lam=1.0), 1024),
    }
    data = {name: asyncio.run(curve(objective, k, steps, seed)) for name, (objective, k) in runs.items()}
    (IMAGES / "curves.json").write_text(json.dumps({"steps": steps, "seed": seed, "runs": data}, indent=1) + "\n")
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8), dpi=120, layout="constrained")
    for (name, rows), colour, marker in zip(data.items(), COLOURS, "os^vDx", strict=True):
        for axis, key in zip(axes, ("reverse_kl", "jsd"), strict=True):
            axis.plot([r["step"] for r in rows], [r[key] for r in rows], f"-{marker}", ms=4, color=colour, label=name)
    axes[0].set(title="held-out KL(student || teacher), nats", xlabel="step")
    axes[1].set(title="held-out JSD, nats", xlabel="step")
    finish(plt, figure, axes, "curves.png")


async def curve(objective: object, k: int, steps: int, seed: int) -> list[dict[str, float]]:
    """Evaluations of one run on the demo's assets, teacher in this process."""
    import tempfile

    from topkd.compose import demo
    from topkd.compose.demo_assets.assets import build_assets, cache_root
    from topkd.compose.progress import Progress
    from topkd.compose.run.observers import Observers
    from topkd.compose.run.run import open_claimed_run
    from topkd.compose.run.runner import TrainingParts, run_training
    from topkd.compose.run.sampler import open_in_process
    from topkd.compose.teachers.open import Teachers
    from topkd.engine.models.local_teacher import LocalTeacher

    assets = build_assets(cache_root(), Progress())
    pair, rows = await demo._Pair.load(assets), demo.choose_prompts(assets.training, seed)  # noqa: SLF001
    config = demo.build_demo_config("topk_pg", steps, seed).model_copy(update={"objective": objective, "k": k})
    with tempfile.TemporaryDirectory() as folder, open_claimed_run(config, Path(folder)) as run:
        sampling = open_in_process(config, pair.student, pair.tokenizer)
        teachers = Teachers({"": LocalTeacher(pair.judge)})
        parts = TrainingParts(config, pair.student, pair.tokenizer, rows, teachers, sampling, Observers(pair.evaluate))
        result = await run_training(run, parts)
    return result.evals


def pyplot():
    """Pyplot on the file backend."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def finish(plt, figure, axes, name: str) -> None:
    """House look, one legend, save."""
    for axis in axes:
        axis.grid(color="#e5e5e5", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    axes[0].legend(frameon=False, fontsize=8)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / name)
    plt.close(figure)
    print(IMAGES / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["bias", "curves"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.only != "curves":
        draw_bias()
    if options.only != "bias":
        draw_curves(options.steps, options.seed)
