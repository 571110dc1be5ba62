"""One optimiser step on prepared samples: forward the rows that train, form the objective, step, report."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topkd.engine.batching import micro_batches
from topkd.engine.learner_config import ImportanceSampling, LearnerConfig
from topkd.engine.objective_config import Objective
from topkd.engine.objectives import TokenStats, objective_loss, valid_tokens
from topkd.engine.student import Student
from topkd.topk import kl_k1, kl_k3
from topkd.topk.errors import ConfigError, TrainingError
from topkd.topk.samples import PreparedSample

MAX_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True, slots=True)
class LearnerState:
    """What a checkpoint keeps of a learner beside the weights.

    Attributes:
        values: JSON: version, skips in a row, the objective's own state (TAID's schedule).
        tensors: Optimiser state by "parameter name/entry", whole tensors (safetensors can hold them).
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]


class Learner:
    """Owns the optimiser. ``version`` counts the steps that changed the weights' history, and labels rollouts.

    Args:
        student: The model; its weights change only inside ``step``, under ``lock``.
        config: Optimiser settings.
        objective: What to minimise.
        lock: Held while weights change or are read for a step (share it with an in-process sampler).
        steps: How many steps the run takes: what schedules run towards.
    """

    def __init__(
        self,
        student: Student,
        config: LearnerConfig,
        objective: Objective,
        *,
        lock: threading.Lock | None = None,
        steps: int | None = None,
    ) -> None:
        self.student, self.config, self.objective = student, config, objective
        self.lock = lock or threading.Lock()
        self.steps = steps
        self.version = 0
        self._skipped_in_a_row = 0
        self._named = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
        self._trained = list(self._named.values())
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )

    def step(self, samples: Sequence[PreparedSample]) -> dict[str, Any]:
        """Take one step; returns the diary entry.

        A step without a trainable token, or with a non-finite gradient, changes no weight and says so in ``skipped``;
        several in a row end the run.
        """
        masks = [valid_tokens(sample, self.objective, self.student.vocab_size) for sample in samples]
        num_tokens = int(sum(mask.sum() for mask in masks))
        stats: list[TokenStats] = []
        loss_sum, norm, skipped = 0.0, math.nan, "" if num_tokens else "no trainable token"
        with self.lock:
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr()
            for batch in micro_batches(samples, masks, self.config.micro_batch_tokens, self.student.device):
                hidden = self.student.hidden_rows(batch.input_ids, batch.attention_mask, batch.rows)
                loss, tokens = objective_loss(
                    self.objective,
                    student=self.student,
                    hidden=hidden,
                    batch=batch,
                    importance=self.config.importance,
                    num_tokens=num_tokens,
                )
                loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += float(loss.detach())
                stats.append(tokens)
            if num_tokens:
                norm = float(torch.nn.utils.clip_grad_norm_(self._trained, self.config.max_grad_norm))
                if math.isfinite(norm) and math.isfinite(loss_sum):
                    self._optimizer.step()
                else:
                    skipped = "non-finite gradient"
            self._optimizer.zero_grad(set_to_none=True)
            self.version += 1
        self._count_skips(skipped)
        tokens_given = int(sum(sample.core.mask.sum() for sample in samples))
        return {
            "loss": loss_sum,
            "grad_norm": norm,
            "lr": self._optimizer.param_groups[0]["lr"],
            "tokens": num_tokens,
            "masked_tokens": tokens_given - num_tokens,
            "skipped": skipped,
            **(token_metrics(stats, self.config.importance) if stats else {}),
        }

    def state_dict(self) -> LearnerState:
        """Everything but the weights that the next step depends on: optimiser, version, skips, objective."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value.detach().clone()
        values = {"version": self.version, "skipped_in_a_row": self._skipped_in_a_row, "objective": {}}
        return LearnerState(values, tensors)

    def load_state_dict(self, state: LearnerState) -> None:
        """Continue from ``state_dict()`` of a learner with the same parameters; anything else is refused."""
        fresh: dict[str, dict[str, Tensor]] = {}
        for path, value in state.tensors.items():
            name, _, key = path.rpartition("/")
            parameter = self._named.get(name)
            if parameter is None or (value.dim() and value.shape != parameter.shape):
                expected = "no such parameter" if parameter is None else tuple(parameter.shape)
                raise ConfigError(
                    "optimiser state of another student", where=name, got=tuple(value.shape), expected=expected
                )
            fresh.setdefault(name, {})[key] = value.clone() if not value.dim() else value.to(parameter.device).clone()
        self._optimizer.state.clear()
        for name, entries in fresh.items():
            self._optimizer.state[self._named[name]] = entries
        self.version = int(state.values["version"])
        self._skipped_in_a_row = int(state.values["skipped_in_a_row"])

    def _lr(self) -> float:
        warm = self.config.warmup_steps
        return self.config.lr * (min(1.0, (self.version + 1) / warm) if warm else 1.0)

    def _count_skips(self, skipped: str) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{self._skipped_in_a_row} steps in a row changed nothing",
                got=skipped,
                hint="lower learner.lr, or look at masked_tokens and lost samples in metrics.jsonl",
            )


def token_metrics(stats: Sequence[TokenStats], importance: ImportanceSampling) -> dict[str, float]:
    """What a step's tokens say, as numbers for the diary; KLs are in nats and have the sign of a KL.

    ``kl_k1`` is the mean of log s - log t over sampled tokens (an estimate of KL(S||T)), ``kl_k3`` the non-negative
    estimate expm1(d) - d with d = log t - log s, ``behavior_kl_k3`` the same between rollout and current policy. Tokens
    that the teacher excludes (log t = -inf) have no finite estimate: they are left out of both and counted in
    ``teacher_zero_tokens``. ``gated_rows`` are those of the top-K objective whose tail is empty to rounding.
    """
    new, behavior, teacher, advantage = (
        np.concatenate([getattr(part, name) for part in stats]).astype(np.float64)
        for name in ("logp_new", "logp_behavior", "logp_teacher", "advantage")
    )
    known = np.isfinite(teacher)
    finite = advantage[np.isfinite(advantage)]  # at beta = 1 a token the teacher excludes has none
    ratio = np.exp(np.clip(new - behavior, -20.0, 20.0))
    return {
        "kl_k1": float(kl_k1(teacher, new)[known].mean()) if known.any() else math.nan,
        "kl_k3": float(kl_k3(teacher, new)[known].mean()) if known.any() else math.nan,
        "teacher_zero_tokens": int((~known).sum()),
        "advantage_mean": float(finite.mean()) if finite.size else math.nan,
        "advantage_std": float(finite.std()) if finite.size else math.nan,
        "advantage_abs_mean": float(np.abs(finite).mean()) if finite.size else math.nan,
        "ratio_mean": float(ratio.mean()),
        "ratio_max": float(ratio.max()),
        "ratio_capped": float((ratio > importance.cap).mean()) if importance.kind == "truncated" else 0.0,
        "ess": float(ratio.sum() ** 2 / np.square(ratio).sum() / ratio.size),
        "behavior_kl_k3": float(kl_k3(new, behavior).mean()),
        **estimator_means(stats),
    }


def estimator_means(stats: Sequence[TokenStats]) -> dict[str, float]:
    """The top-K estimator's gated rows of the whole step, and its (K+1)-bin divergence per token; else nothing."""
    if not all(part.estimator for part in stats):
        return {}
    tokens = sum(part.logp_new.size for part in stats)
    bucket = sum(part.estimator["divergence_bucket"] * part.logp_new.size for part in stats)
    return {
        "gated_rows": sum(part.estimator["gated_rows"] for part in stats),
        "divergence_bucket": bucket / tokens,
    }
