"""Run folders made on the spot, with every field a run log can have and numbers that are easy to check by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from topkd.compose.comparison.summary import judge_arms, summarize_arms
from topkd.engine.loop.metrics import make_strict_json

EDGES = [2.0**power for power in range(-4, 5)]
NASTY = "</script><script>window.pwned=1</script><!-- <img src=x onerror=window.pwned=1> \u2028 & '\""
RATES = {"scalar_kl": 0.2, "gjs": 0.25, "topk_pg": 0.5}


def step(n: int, rng: np.random.Generator, kind: str = "topk_pg", steps: int = 60) -> dict[str, Any]:
    """Step record number ``n``: 100 tokens, 4 samples, 0.5 seconds."""
    noise = float(rng.normal(0.0, 0.05))
    return {
        "kind": "step",
        "step": n,
        "divergence_mode": kind,
        "tokens": 100,
        "completion_tokens": 100,
        "samples": 4,
        "truncated": 1,
        "skipped": "",
        "lost": {},
        "staleness": min(1, n - 1),
        "kl_k1": 2.0 - RATES[kind] * n / steps + noise,
        "grad_norm": 1.0 + noise,
        "advantage_abs_mean": 0.3,
        "ess": 0.98,
        "clip_fraction": 0.01,
        "ratio_max": 2.0,
        "behavior_kl_k3": 0.01,
        "mismatch_kl": 1e-6,
        "effective_coefficient": 0.5,
        "grad_noise": (30.0 + n) / (1.0 + 20 * noise),  # wild, as a ratio of noisy numbers is
        "grad_noise_trace": 30.0 + n,
        "grad_signal": 1.0 + 20 * noise,
        "lr": 1e-3,
        "sync_kl": 1e-5,
        "divergence_bucket": 0.2,
        "sft_loss": 2.5 - 0.01 * n,
        "publish_s": 0.01,
        "ratio_hist": [0, 0, 1, 9, 80, 8, 2, 0],
        "ratio_hist_edges": EDGES,
        "missing_mass": 0.01,
        "tail_mass": 0.3,
        "topk_overlap": 0.6,
        "realised_in_topk": 0.5,
        "entropy_lo": 1.5,
        "entropy_hi": 2.5,
        "length_mean": 25.0,
        "truncation_rate": 0.25,
        "eos_probability": 0.02,
        "scored_tokens": 120,
        "requests": 4,
        "retries": n % 2,
        "cache_hits": 1,
        "teacher_bytes": 4000,
        "elapsed_s": 0.5 * n,
        "sample_s": 0.2,
        "score_wait_s": 0.1,
        "learn_s": 0.2,
    }


def evaluation(n: int, kind: str, seed: int, steps: int) -> dict[str, Any]:
    """Held-out KL falls from 2 by the objective's rate, and a little more for each seed; two kinds of prefixes."""
    kl = 2.0 - (RATES[kind] + 0.01 * seed) * n / steps
    record = {"reverse_kl": kl, "forward_kl": 0.9 * kl, "jsd": 0.2 * kl, "agreement": 1 - kl / 4, "accuracy": 0.25}
    return {"kind": "eval", "step": n, **record, "fresh": {"reverse_kl": kl + 0.1, "forward_kl": kl, "jsd": 0.3}}


def token(n: int, text: str, k: int = 4) -> dict[str, Any]:
    """One token of a rollout: its advantage rises from below to above zero along the rollout."""
    teacher = [[10 + i, -0.5 * (i + 1) - 0.7] for i in range(k)]
    student = [[10 + 2 * i, -0.4 * (i + 1) - 0.9] for i in range(k)]
    return {
        "id": 10 + n % k,
        "text": text,
        "behavior_logp": -1.0,
        "student_logp": -1.1,
        "teacher_logp": -1.2,
        "advantage": (n - 6) / 10,
        "divergence": n / 20,
        "trains": n != 3,
        "teacher": teacher,
        "student": student,
    }


def rollout(at: int, count: int = 14, nasty: str = NASTY) -> dict[str, Any]:
    """A recorded rollout whose texts try to break out of the page."""
    words = [nasty, " the", "\n", "  indent", " cat", "\t", " sat", "é", "", " on", " a", " mat", ".", " end"]
    return {
        "kind": "rollout",
        "format": 1,
        "step": at,
        "sample_id": f"row {at} {nasty[:12]}",
        "objective": "topk_pg",
        "divergence": "GJS with beta 0.5 on the teacher's list and one bin for the rest",
        "prompt": f"Say something: {nasty}",
        "left_out": 3,
        "texts": {str(10 + i): f"t{i}{nasty if i == 1 else ''}" for i in range(8)},
        "tokens": [token(i, words[i % len(words)]) for i in range(count)],
    }


def write_run(
    folder: Path,
    kind: str = "topk_pg",
    *,
    seed: int = 0,
    steps: int = 60,
    every: int = 10,
    done: int | None = None,
    drop: tuple[str, ...] = (),
    rollouts: int = 2,
) -> Path:
    """A run's folder; ``drop`` leaves fields out, ``done`` ends it early."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"steps": steps, "seed": seed, "k": 20, "objective": {"kind": kind}, "learner": {"lr": 1e-3}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = [{"kind": "event", "event": "start"}, evaluation(0, kind, seed, steps)]
    for n in range(1, (done or steps) + 1):
        records.append({key: value for key, value in step(n, rng, kind, steps).items() if key not in drop})
        if n % every == 0:
            records.append(evaluation(n, kind, seed, steps))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    lines = [json.dumps(rollout(1 + i)) + "\n" for i in range(rollouts)]
    if lines:
        (folder / "tokens.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_comparison(folder: Path, *, seeds: int = 3, steps: int = 20, finished: bool = True) -> Path:
    """A comparison of two arms, live and replayed, as ``topkd compare`` lays it out; two scalar runs are censored."""
    labels = {"scalar_kl": "sampled token", "topk_pg": "top-20"}
    cells, results = [], {}
    for phase in ("live", "replay"):
        for arm in labels:
            for seed in range(seeds):
                name = f"{phase}-{arm}-seed{seed}"
                write_run(folder / "cells" / name, arm, seed=seed, steps=steps, every=5, rollouts=phase == "live")
                cell = {"id": name, "phase": phase, "arm": arm, "seed": seed, "params": {"arm": arm, "lr": 1e-3}}
                cells.append({**cell, "run": f"cells/{name}", "status": "done"})
                results[arm, seed] = _result(arm, seed, steps)
    arms = [{"name": name, "label": label, "lr": 1e-3, "set": {}} for name, label in labels.items()]
    config = {"name": "scalar against top-K", "base": "embedded", "arms": arms, "seeds": [*range(seeds)]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if not finished:
        return folder
    rows = summarize_arms([*labels], results, range(seeds), "reverse_kl", 0.893)
    said = judge_arms(rows, labels, "reverse_kl")
    tuning = {"rates": [3e-4, 1e-3, 3e-3, 1e-2], "areas": [0.97, 0.93, 0.95, None], "best": 1e-3, "edge": ""}
    summary = config | {
        "note": "Made up.",
        "metric": "reverse_kl",
        "target": 0.893,
        "reference": "scalar_kl",
        "cells": cells,
        "live": {"arms": rows, "verdict": said},
        "replay": {"arms": rows, "verdict": said},
        "tuning": dict.fromkeys(labels, tuning),
        "tuned": {"rates": [3e-4, 1e-3, 3e-3], "seeds": [1000], "extensions": 1},
        "refused": [],
        "verdict": said,
    }
    (folder / "compare.json").write_text(json.dumps(make_strict_json(summary)), encoding="utf-8")
    return folder


def _result(arm: str, seed: int, steps: int) -> dict[str, Any]:
    evals = [evaluation(n, arm, seed, steps) | {"tokens": 100 * n} for n in range(0, steps + 1, 5)]
    entries = 100 * steps * (1 if arm == "scalar_kl" else 21)
    cost = {"teacher_calls": 4 * steps, "teacher_tokens": 100 * steps, "teacher_entries": entries}
    return {
        "evals": evals,
        "tokens": 100 * steps,
        **cost,
        "teacher_bytes": 8 * entries,
        "clipped": 0.01,
        "truncated": 1,
    }
