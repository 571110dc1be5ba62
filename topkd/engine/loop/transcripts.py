"""Record a few rollouts of a run, token by token, with both sides' lists, for the report's token explorer.

``tokens.jsonl`` holds one rollout per line. Its texts are written by models and must not be trusted.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topkd.engine.config.objectives import CustomObjective, Objective
from topkd.engine.learner.objectives import find_valid_tokens
from topkd.engine.loop.metrics import make_strict_json
from topkd.engine.loop.scoring import ScoredBatch
from topkd.engine.models.student import Student
from topkd.topk import TopK, gjs_advantage
from topkd.topk.losses import SparseTeacher
from topkd.topk.losses.topk_policy import compute_bucket_divergence
from topkd.topk.samples import PreparedSample, TopKPreparedSample
from topkd.topk.types import Float32, Float64, Int32

FORMAT = 1
_ROWS_AT_ONCE = 256  # bounds the [rows, V] temporaries


@dataclass(frozen=True, slots=True)
class TranscriptLimits:
    """Limits on how much of a run is recorded.

    Attributes:
        moments: Steps to record, first and last included.
        rollouts: Rollouts to record per step.
        k: Most entries to record of each list.
        max_tokens: Most tokens to record of a rollout; the others are counted in ``left_out``.
    """

    moments: int = 8
    rollouts: int = 2
    k: int = 20
    max_tokens: int = 512


class TranscriptRecorder:
    """Write a few rollouts of evenly spaced steps to a file; ``on_batch`` is a hook of the loop.

    Recording takes one forward pass of the student on those rollouts, under the lock, without gradients or random
    numbers, so it does not change the training. A step that the file already holds (a resumed run) is not written
    again, and a file that cannot be written ends the recording, not the run.

    Args:
        path: The file, appended to.
        student: The model whose distributions are recorded beside the teacher's.
        tokenizer: Turns ids into texts; None leaves ids.
        objective: The run's objective, which defines the advantages.
        lock: Held while the student's weights are read.
        steps: Steps of the run.
        limits: How much is recorded.
        problem: Called once, with the reason, if recording ends early.
    """

    def __init__(
        self,
        path: Path,
        *,
        student: Student,
        tokenizer: Any,
        objective: Objective,
        lock: threading.Lock,
        steps: int,
        limits: TranscriptLimits | None = None,
        problem: Callable[[str], None] | None = None,
    ) -> None:
        self.path, self.student, self.tokenizer, self.objective, self.lock = path, student, tokenizer, objective, lock
        self.kind = objective.name
        self.limits, self.problem = limits or TranscriptLimits(), problem
        moments = np.linspace(1, steps, min(self.limits.moments, steps))
        self.moments = {round(step) for step in moments} - _read_recorded_steps(path)

    def on_batch(self, step: int, batch: ScoredBatch) -> None:
        """Record the first rollouts of a step that is one of the moments."""
        if step not in self.moments:
            return
        self.moments.discard(step)
        lines = [
            json.dumps(
                make_strict_json(self.record(step, sample)), allow_nan=False, ensure_ascii=False, separators=(",", ":")
            )
            for sample in _choose_spread(batch.samples, self.limits.rollouts)
        ]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            self.moments.clear()
            if self.problem is not None:
                self.problem(f"rollouts are no longer recorded: {self.path}: {error.strerror}")

    def record(self, step: int, sample: PreparedSample) -> dict[str, Any]:
        """Describe one rollout in plain Python values."""
        core, tokens = sample.core, min(self.limits.max_tokens, sample.core.completion_len)
        teacher = sample.teacher if isinstance(sample, TopKPreparedSample) else TopK.from_lists([None] * tokens)
        teacher = teacher.within(self.student.vocab_size)
        ids, at_teacher, student = self._student(
            core.full_ids[: core.prompt_len + tokens], core.prompt_len, teacher.ids
        )
        teacher_logp = sample.teacher_logp[:tokens]
        advantage = self._advantage(teacher_logp, student)
        divergence, name = self._divergence(teacher.slice(slice(tokens)), at_teacher)
        trains = core.mask if self.kind == "sft" else find_valid_tokens(sample, self.objective, self.student.vocab_size)
        texts: dict[str, str] = {}
        rows = []
        for row in range(tokens):
            listed = _list_pairs(teacher.ids[row].tolist(), teacher.logp[row].tolist())[: self.limits.k]
            own = _list_pairs(*ids[row])
            for token, _ in listed + own:
                texts[str(token)] = texts.get(str(token)) or self._text(token)
            rows.append(
                {
                    "id": int(core.completion_ids[row]),
                    "text": self._text(int(core.completion_ids[row])),
                    "behavior_logp": _round_short(sample.behavior.logp[row]),
                    "student_logp": _round_short(student[row]),
                    "teacher_logp": _round_short(teacher_logp[row]),
                    "advantage": _round_short(advantage[row]),
                    "divergence": _round_short(divergence[row]),
                    "trains": bool(trains[row]),
                    "teacher": listed if teacher.k else None,
                    "student": own,
                }
            )
        return {
            "kind": "rollout",
            "format": FORMAT,
            "step": step,
            "sample_id": core.sample_id,
            "teacher_id": core.teacher_id,
            "objective": self.kind,
            "divergence": name,
            "prompt": self._decoded(core.full_ids[: core.prompt_len]),
            "left_out": core.completion_len - tokens,
            "texts": texts,
            "tokens": rows,
        }

    @torch.inference_mode()
    def _student(
        self, full_ids: Int32, prompt_len: int, at: Int32
    ) -> tuple[list[tuple[list[int], list[float]]], Float64, Float32]:
        """Compute the student's own top-K of each row, its logprobs at the ids ``at``, and at the realised token."""
        inputs = torch.from_numpy(full_ids[:-1].astype(np.int64))[None].to(self.student.device)
        own: list[tuple[list[int], list[float]]] = []
        listed, realised = [], []
        with self.lock:
            for first in range(prompt_len - 1, full_ids.size - 1, _ROWS_AT_ONCE):
                after = min(first + _ROWS_AT_ONCE, full_ids.size - 1)
                places = torch.arange(first, after, device=self.student.device)
                logp = self.student.logit_rows(inputs, torch.ones_like(inputs), places).log_softmax(-1).cpu()
                top = logp.topk(min(self.limits.k, logp.shape[1]))
                own += list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                wanted = torch.from_numpy(at[first - prompt_len + 1 : after - prompt_len + 1].astype(np.int64))
                listed.append(logp.gather(1, wanted.clamp(min=0)).masked_fill(wanted < 0, -torch.inf).numpy())
                drawn = torch.from_numpy(full_ids[first + 1 : after + 1].astype(np.int64))
                realised.append(logp.gather(1, drawn[:, None])[:, 0].numpy())
        return own, np.concatenate(listed).astype(np.float64), np.concatenate(realised)

    def _advantage(self, teacher_logp: Float32, student_logp: Float32) -> Float64:
        """Compute each sampled token's advantage before baselines, clips and weights; NaN where it has none."""
        if isinstance(self.objective, CustomObjective) or not self.objective.needs_behavior:
            return np.full(teacher_logp.shape, np.nan)
        return np.asarray(gjs_advantage(teacher_logp, student_logp, getattr(self.objective, "beta", 1.0)), np.float64)

    def _divergence(self, teacher: TopK, student_logp: Float64) -> tuple[Float64, str]:
        """Compute each row's divergence on the teacher's list and one bin for the rest; NaN without a list."""
        beta = getattr(self.objective, "beta", 1.0)
        name = {0.0: "KL(T‖S)", 1.0: "KL(S‖T)"}.get(beta, f"GJS with beta {beta:g}")
        if not teacher.k:
            return np.full(teacher.rows, np.nan), "not known: the teacher's lists were not requested"
        rows = SparseTeacher.from_topk(teacher, torch.device("cpu"), torch.float64)
        values = compute_bucket_divergence(torch.from_numpy(student_logp), rows, beta).numpy()
        return np.where(teacher.signal, values, np.nan), f"{name} on the teacher's list and one bin for the rest"

    def _text(self, token: int) -> str:
        """Decode one token; part of a character is shown in the tokenizer's own notation."""
        if self.tokenizer is None:
            return f"#{token}"
        text = str(self.tokenizer.decode([token]))
        return str(self.tokenizer.convert_ids_to_tokens(token)) if "�" in text or not text else text

    def _decoded(self, ids: Int32) -> str:
        if self.tokenizer is None:
            return " ".join(f"#{token}" for token in ids)
        return str(self.tokenizer.decode(ids.tolist()))


def _choose_spread(samples: Sequence[PreparedSample], count: int) -> list[PreparedSample]:
    """Choose ``count`` samples spread over the batch, because neighbours share a prompt."""
    places = sorted({int(place) for place in np.linspace(0, len(samples) - 1, min(count, len(samples)))})
    return [samples[place] for place in places]


def _list_pairs(ids: list[int], logps: list[float]) -> list[tuple[int, float]]:
    """Pair ids and logprobs, without pads."""
    return [(token, _round_short(logp)) for token, logp in zip(ids, logps, strict=True) if token >= 0]


def _round_short(value: float) -> float:
    """Round to four digits, for display."""
    return float(f"{float(value):.4g}")


def _read_recorded_steps(path: Path) -> set[int]:
    """Read which steps the file holds; remove an incomplete last line, so that the next record starts a line."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return {record["step"] for record in map(json.loads, whole.splitlines()) if isinstance(record.get("step"), int)}
