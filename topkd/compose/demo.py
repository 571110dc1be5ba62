"""``topkd demo``: distil on this machine alone, without a download, from a real server in another process.

The corpus is the source code of Python's standard library. A byte-level BPE, a teacher and a much less trained student
are trained on it and cached. The teacher's server returns logprobs over HTTP, and the student learns from them. This
process loads the teacher's weights too, but only to *measure* the exact divergence before and after.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

import topkd
from topkd.clients import ClientConfig, connect
from topkd.compose.demo_assets.assets import (
    PROMPT_TOKENS,
    Assets,
    build_assets,
    cache_root,
    choose_prompts,
    continue_prompts,
)
from topkd.compose.demo_assets.first_run import FOLDER, write_first_run
from topkd.compose.demo_assets.folders import open_demo_folder
from topkd.compose.progress import Progress
from topkd.compose.run.observers import Observers
from topkd.compose.run.run import Run, RunResult, open_claimed_run
from topkd.compose.run.runner import TrainingParts, run_training
from topkd.compose.run.sampler import open_in_process
from topkd.compose.run.signals import StopSignals
from topkd.compose.teachers.open import Teachers
from topkd.engine import EngineConfig, LearnerConfig, RolloutConfig
from topkd.engine.config.objectives import GJS, Objective, ScalarKL, TopKPolicyGradient
from topkd.engine.loop.prompts import PromptRow
from topkd.report.load.run_folder import DEMO
from topkd.report.page.figures import write_demo_curve
from topkd.serve import ServeConfig, ServerProcess

if TYPE_CHECKING:
    from topkd.engine.models.divergences import Probe
    from topkd.engine.models.student import Student

ObjectiveName = Literal["scalar_kl", "gjs", "topk_pg"]

COMPLETION_TOKENS = 32
PROBES = 96
PROBE_TOKENS = 48
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Results of the demo, and the run file that it writes (``topkd.compose.demo_assets.first_run``)."""

    out: Path
    figure: Path
    run_file: Path
    before: dict[str, float]
    after: dict[str, float]
    samples: dict[str, str]
    tokens: int
    seconds: dict[str, float]


async def demo(
    objective: ObjectiveName = "topk_pg",
    *,
    steps: int = 150,
    seed: int = 0,
    out: str | Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    signals: StopSignals | None = None,
) -> DemoResult | RunResult:
    """Build (or reuse) the tiny models, serve the teacher, distil over HTTP, measure exactly, draw the curve.

    Args:
        objective: The student's objective.
        steps: Number of updates.
        seed: Seed of prompts and rollouts.
        out: A new or an empty folder; None takes an unused one in ``runs``.
        cache: Folder that keeps the models; None takes the user's cache folder.
        progress: Shows notes and records.
        signals: Signals on which the run ends early; the result is then that of the stopped run.
    """
    import torch

    progress = progress or Progress()
    config = build_demo_config(objective, steps, seed)
    began, usual = time.perf_counter(), Path("runs") / f"demo-{objective}-seed{seed}"
    with (
        _note_if_stopped(progress, "nothing was kept"),
        open_demo_folder(None if out is None else Path(out), usual, progress) as folder,
    ):
        assets = build_assets(cache or cache_root(), progress, None if signals is None else signals.obey)
    seconds = {"assets": time.perf_counter() - began}
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))  # the other half is for the server

    pair, rows = await _Pair.load(assets), choose_prompts(assets.training, seed)
    samples = {"prompt": pair.tokenizer.decode(pair.shown_prompt), "student before": await pair.answer(pair.student)}
    began = time.perf_counter()
    with open_claimed_run(config, folder, progress, signals) as run:
        result = await _distil(run, config, pair, rows, assets.teacher)
    if result.stopped:
        return result
    seconds["distil"] = time.perf_counter() - began
    samples |= {"student after": await pair.answer(pair.student), "teacher": await pair.answer(pair.judge)}
    run_file = write_first_run(
        folder / FOLDER,
        config,
        teacher=assets.teacher,
        student=assets.student,
        prompts=[pair.tokenizer.decode(row.prompt_ids) for row in rows],
        held_out=[pair.tokenizer.decode(probe.ids[: probe.prompt_len]) for probe in pair.probes],
    )
    return _finish(result, samples, seconds, objective, run_file)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Student and teacher, loaded in this process. The teacher is used only to measure the student."""

    student: Student
    judge: Student
    tokenizer: Any
    probes: list[Probe]

    @classmethod
    async def load(cls, assets: Assets) -> _Pair:
        from topkd.engine.models.student import Student
        from topkd.engine.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(str(assets.student))
        student, judge = (Student.load(str(folder), "cpu") for folder in (assets.student, assets.teacher))
        # Held-out prompts, each continued by the untrained student: fixed prefixes to measure on, whatever the seed.
        starts = np.random.default_rng(0).integers(0, len(assets.held_out) - PROMPT_TOKENS, size=PROBES)
        prompts = [assets.held_out[start : start + PROMPT_TOKENS] for start in starts]
        probes = await continue_prompts(student, prompts, PROBE_TOKENS, [tokenizer.eos_token_id])
        return cls(student, judge, tokenizer, probes)

    @property
    def shown_prompt(self) -> NDArray[np.int32]:
        return self.probes[0].ids[: self.probes[0].prompt_len]

    def evaluate(self) -> dict[str, Any]:
        from topkd.engine.models.divergences import exact_divergences

        return exact_divergences(self.student, self.judge, self.probes)

    async def answer(self, model: Student) -> str:
        (probe,) = await continue_prompts(model, [self.shown_prompt], 40, [self.tokenizer.eos_token_id])
        return str(self.tokenizer.decode(probe.ids[probe.prompt_len :], skip_special_tokens=True))


async def _distil(run: Run, config: EngineConfig, pair: _Pair, rows: Sequence[PromptRow], teacher: Path) -> RunResult:
    """Serve the teacher in another process, and train the student on its scores."""
    run.progress.note("starting the teacher's server in another process")
    # One sequence per forward pass: rounding depends on the batch, and a larger batch would depend on timing.
    serve = ServeConfig(
        model=str(teacher), served_model_name="teacher", port=0, max_logprobs=config.k, max_batch_tokens=1
    )
    with contextlib.ExitStack() as stack:
        with _note_if_stopped(run.progress, "the models are kept for the next demo"):
            server = stack.enter_context(ServerProcess(serve, log_path=run.out / "server.log"))
        kind = config.objective.kind
        run.progress.note(f"teacher at {server.url} (process {server.pid}); K = {config.k}, objective {kind}")
        async with await connect(server.url, model="teacher", config=ClientConfig(total_timeout_s=300.0)) as client:
            sampling = open_in_process(config, pair.student, pair.tokenizer)
            observers = Observers(pair.evaluate)
            parts = TrainingParts(
                config, pair.student, pair.tokenizer, rows, Teachers({"": client}), sampling, observers
            )
            return await run_training(run, parts)


def build_demo_config(objective: ObjectiveName, steps: int, seed: int) -> EngineConfig:
    """Build the engine settings of the demo; they are saved in the run folder."""
    objectives: dict[ObjectiveName, Objective] = {
        "scalar_kl": ScalarKL(),
        "gjs": GJS(),
        "topk_pg": TopKPolicyGradient(),
    }
    return EngineConfig(
        steps=steps,
        seed=seed,
        k=20,
        max_staleness=1,
        eval_every=max(1, steps // 6),
        objective=objectives[objective],
        rollout=RolloutConfig(
            prompts_per_step=32, samples_per_prompt=1, max_completion_tokens=COMPLETION_TOKENS, batch_size=32
        ),
        learner=LearnerConfig(lr=LEARNING_RATE, warmup_steps=5),
    )


@contextlib.contextmanager
def _note_if_stopped(progress: Progress, kept: str) -> Iterator[None]:
    """Note what is kept when a signal ends the demo before its first step."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        progress.note(f"stopped before the first step: {kept}")
        raise


def _finish(
    result: RunResult, samples: dict[str, str], seconds: dict[str, float], objective: str, run_file: Path
) -> DemoResult:
    figure = write_demo_curve(
        result.evals, result.steps, result.out / "curve.png", title=f"topkd {topkd.__version__} demo: {objective}"
    )
    done = DemoResult(
        result.out,
        figure,
        run_file,
        result.evals[0],
        result.evals[-1],
        samples,
        sum(record["tokens"] for record in result.steps),
        seconds,
    )
    summary = {"before": done.before, "after": done.after, "tokens": done.tokens, "seconds": seconds, **samples}
    (result.out / DEMO).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return done
