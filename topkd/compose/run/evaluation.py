"""Evaluation while training: grades of answers, exact divergences, and the best student so far."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import EvalConfig
from topkd.compose.preflight.evaluation import EvalPlan, score_answer
from topkd.compose.preflight.lengths import list_stop_ids
from topkd.compose.progress import Progress
from topkd.engine.loop.hooks import Record
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.rollouts import BatchSampler, derive_seed
from topkd.engine.models.divergences import Probe, exact_divergences
from topkd.engine.models.sampler import AnswerSampler
from topkd.engine.models.student import Student, load_causal_lm
from topkd.files import write_atomically
from topkd.topk.protocols import Sampler
from topkd.topk.samples import SamplingParams

BEST = "student-best"
_PREFIXES = "eval_prefixes.json"
_LOWER_IS_BETTER = {"reverse_kl", "forward_kl", "jsd"}


class Evaluation:
    """The ``evaluate`` hook of a run with an ``[eval]`` table.

    ``models`` are the teachers' models by name, if their weights are on this machine. The fixed prefixes and the best
    student are stored in ``out``. ``step`` is the current step of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: EvalPlan,
        *,
        student: Student,
        tokenizer: Any,
        models: Mapping[str, Student],
        out: Path,
    ) -> None:
        self._config, self.table, self.rows, self._student, self._out = config, plan.table, plan.rows, student, out
        self._tokenizer, self._scorer = tokenizer, plan.scorer
        self._left_out, self._prefixes = plan.left_out, plan.prefixes
        self._models = dict(models)
        if self.table.teacher is not None:
            model = Student.wrap(load_causal_lm(self.table.teacher, config.student.dtype), config.student.device)
            self._models = dict.fromkeys(config.teacher_map(), model)
        self.step = 0
        self._ceiling: float | None = None
        self._best = self._kept_best()

    async def measure_ceiling(self, teachers: Mapping[str, object], progress: Progress) -> None:
        """Measure the teacher's own accuracy on the same prompts; records show it beside the student's."""
        if self._left_out:
            progress.note(
                f"exact divergences leave out the rows of teacher {', '.join(map(repr, self._left_out))}: "
                "its weights are not on this machine"
            )
        if self._scorer is None or not self.table.ceiling:
            return
        scores: list[float] = []
        for name, rows in self._by_teacher().items():
            sampler = AnswerSampler(self._models[name]) if name in self._models else teachers.get(name)
            if not isinstance(sampler, Sampler):  # a runtime check: a teacher need not sample
                progress.note("the teacher's accuracy (ceiling) is not measured: its server does not sample")
                return
            answers = await _draw_completions(
                sampler, [row.teacher_prompt_ids for row in rows], self._build_params(), self.table
            )
            scores += [self._score_completions(row, drawn) for row, drawn in zip(rows, answers, strict=True)]
        self._ceiling = float(np.mean(scores))
        progress.note(f"the teacher's own accuracy on {len(scores)} prompts: {100 * self._ceiling:.1f} %")

    def __call__(self) -> list[Record]:
        """Return a record for each kind of prefixes, the first with the accuracy; called in a thread between steps."""
        records = [self._divergences(kind) for kind in self._prefixes]
        records = records or [{"prefixes": "fixed"}]
        if self._scorer is not None:
            records[0] |= self._accuracy()
        self._keep_best(records[0])
        return records

    def on_record(self, kind: str, record: Record) -> None:
        """Remember the step of the next evaluation."""
        if kind == "step":
            self.step = int(record["step"])

    def _accuracy(self) -> Record:
        sampler = AnswerSampler(self._student, batch_size=self._config.rollout.batch_size)
        drawn = asyncio.run(
            _draw_completions(sampler, [row.prompt_ids for row in self.rows], self._build_params(), self.table)
        )
        scores = [self._score_completions(row, answers) for row, answers in zip(self.rows, drawn, strict=True)]
        sizes = [answer.size for answers in drawn for answer in answers]
        record: Record = {
            "accuracy": float(np.mean(scores)),
            "answers": len(sizes),
            "answer_tokens": float(np.mean(sizes)),
        }
        return record if self._ceiling is None else record | {"teacher_accuracy": self._ceiling}

    def _divergences(self, kind: str) -> Record:
        found = []
        for name, rows in self._by_teacher().items():
            if name in self._models:
                found.append(exact_divergences(self._student, self._models[name], self._probes(kind, name, rows)))
        tokens = sum(part["eval_tokens"] for part in found)
        means = {
            key: sum(part[key] * part["eval_tokens"] for part in found) / tokens
            for key in found[0]
            if key != "eval_tokens"
        }
        return {"prefixes": kind, **means, "eval_tokens": tokens}

    def _probes(self, kind: str, name: str, rows: Sequence[PromptRow]) -> list[Probe]:
        if kind == "fresh":
            return _build_probes(rows, self._extend(self._student, [row.prompt_ids for row in rows], self.step))
        kept = self._kept_prefixes()
        if (key := f"{kind} {name}") not in kept:
            by_teacher = kind == "teacher"
            model = self._models[name] if by_teacher else self._student
            prompts = [row.teacher_prompt_ids if by_teacher else row.prompt_ids for row in rows]
            kept[key] = [ids.tolist() for ids in self._extend(model, prompts, 0)]
            write_atomically(self._out / _PREFIXES, json.dumps(kept))
        return _build_probes(rows, [np.array(ids, dtype=np.int32) for ids in kept[key]])

    def _extend(self, model: Student, prompts: list[Any], step: int) -> list[Any]:
        """Sample continuations at temperature 1: divergences are means over the text that a policy writes."""
        params = SamplingParams(
            max_tokens=self.table.max_tokens,
            stop_token_ids=list_stop_ids(self._tokenizer, self._config.rollout.stop_token_ids),
            seed=derive_seed(self._config.seed, "eval prefixes", step),
        )
        sampler = AnswerSampler(model, batch_size=self._config.rollout.batch_size)
        drawn = asyncio.run(sampler.sample_batch(prompts, 1, params))
        return [rollouts[0].completion_ids for rollouts in drawn]

    def _kept_prefixes(self) -> dict[str, list[list[int]]]:
        """Read the prefixes from the start of the run: a resumed run is measured on the same ones."""
        place = self._out / _PREFIXES
        return json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}

    def _keep_best(self, record: Record) -> None:
        metric = self.table.best
        if metric is None:
            return
        value = float(record[metric])
        better = self._best is None or (value < self._best if metric in _LOWER_IS_BETTER else value > self._best)
        if better:
            from topkd.engine.checkpoint.checkpoint import save_student

            self._best = value
            state = {"version": self.step, "metric": metric, "value": value}
            save_student(self._student, self._tokenizer, self._out / BEST, state)

    def _kept_best(self) -> float | None:
        try:
            kept = json.loads((self._out / BEST / "topkd.json").read_text(encoding="utf-8"))
            return float(kept["value"]) if kept["metric"] == self.table.best else None
        except (OSError, ValueError, KeyError):
            return None

    def _by_teacher(self) -> dict[str, list[PromptRow]]:
        rows: dict[str, list[PromptRow]] = {}
        for row in self.rows:
            rows.setdefault(row.teacher_id, []).append(row)
        return rows

    def _score_completions(self, row: PromptRow, answers: Sequence[Any]) -> float:
        assert self._scorer is not None  # noqa: S101 - for the type checker
        texts = [self._tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        return float(np.mean([score_answer(self._scorer, row, text, self.table.path) for text in texts]))

    def _build_params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.table.max_tokens,
            temperature=self.table.temperature,
            stop_token_ids=list_stop_ids(self._tokenizer, self._config.rollout.stop_token_ids),
            seed=derive_seed(self._config.seed, "eval", 0),
        )


async def _draw_completions(
    sampler: Sampler, prompts: list[Any], params: SamplingParams, table: EvalConfig
) -> list[list[Any]]:
    if isinstance(sampler, BatchSampler):
        drawn = await sampler.sample_batch(prompts, table.samples, params)
    else:
        drawn = list(await asyncio.gather(*(sampler.sample(prompt, table.samples, params) for prompt in prompts)))
    return [[rollout.completion_ids for rollout in rollouts] for rollouts in drawn]


def _build_probes(rows: Sequence[PromptRow], written: Sequence[Any]) -> list[Probe]:
    return [
        Probe(np.concatenate([row.prompt_ids, ids]), row.prompt_ids.size, row.teacher_prompt_ids)
        for row, ids in zip(rows, written, strict=True)
        if ids.size
    ]
