"""One optimiser step on prepared samples: forward pass, loss, step, run log entry."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from topkd.engine.config.learner import ImportanceSampling, LearnerConfig
from topkd.engine.config.objectives import TAID, Objective
from topkd.engine.learner.batching import MicroBatch, make_micro_batches
from topkd.engine.learner.distributed import Ranks
from topkd.engine.learner.objectives import (
    TokenStats,
    bind_objective,
    compute_objective_loss,
    compute_text_loss,
    find_valid_tokens,
)
from topkd.engine.learner.optimizers import (
    build_optimizer,
    check_schedule,
    collect_optimizer_tensors,
    compute_rate_factor,
    load_optimizer_tensors,
)
from topkd.engine.learner.parallel import clip_gradients, make_parallel_model
from topkd.engine.learner.token_metrics import GradientNoise, average_passes, batch_metrics, sample_facts, token_metrics
from topkd.engine.learner.token_view import TokenLoss
from topkd.engine.models.student import Precision, Student
from topkd.topk.errors import ConfigError, TrainingError
from topkd.topk.samples import PreparedSample, TextSample
from topkd.topk.schedule import TAIDScheduler

MAX_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True, slots=True)
class LearnerState:
    """State of a learner in a checkpoint, besides the weights.

    Attributes:
        values: JSON: version, steps skipped in a row, the objective's own state (TAID's schedule).
        tensors: Optimiser state by "parameter name/entry", as unsharded tensors (for safetensors).
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(slots=True)
class _Pass:
    """Results of one optimiser step: losses of the objective and of the texts, gradient norm, token statistics."""

    skipped: str = ""
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])
    norm: float = math.nan
    stats: list[TokenStats] = field(default_factory=list)
    noise: dict[str, float] = field(default_factory=dict)


class Learner:
    """Takes optimiser steps on the student. ``version`` counts them; rollouts are labelled with it.

    Args:
        student: The model; its weights change only inside ``step``, under ``lock``.
        config: Optimiser settings.
        objective: What to minimise: settings, or a function that returns each token's loss.
        loss: The function that a custom objective's settings name, already loaded.
        lock: Held while weights change or are read for a step (share it with an in-process sampler).
        steps: Number of steps of the run; schedules need it.
        ranks: The processes that share each step; every one makes the same calls.
        stop_ids: Tokens that end a completion; the run log shows how probable they are.
    """

    def __init__(
        self,
        student: Student,
        config: LearnerConfig,
        objective: Objective | TokenLoss,
        *,
        loss: TokenLoss | None = None,
        lock: threading.Lock | None = None,
        steps: int | None = None,
        ranks: Ranks | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        check_schedule(config, steps)
        self._loss = bind_objective(objective, loss)
        self.student, self.config, self.objective, self.steps = student, config, self._loss.settings, steps
        if (why := self.objective.find_conflict(config.importance.kind)) is not None:
            raise ConfigError(why)
        self.lock = lock or threading.Lock()
        self.ranks = ranks or Ranks()
        self.stop_ids = tuple(stop_ids)
        self.version = 0
        self._skipped_in_a_row = 0
        self._taid = _make_scheduler(self.objective, steps)
        self._precision = choose_precision(config, student.device)
        self._model = make_parallel_model(
            student, self.ranks, config.strategy, self._precision, checkpointing=config.gradient_checkpointing
        )
        self._trained = list(self._model.named.values())
        self._peak = config.learning_rate(lora=student.lora)
        self._optimizer = build_optimizer(config, self._trained, self._peak)

    def step(self, samples: Sequence[PreparedSample], texts: Sequence[TextSample] = ()) -> dict[str, Any]:
        """Take one step and return its run log entry, the same on every rank.

        A step without a trainable token, or with a non-finite gradient, changes no weight, and ``skipped`` gives the
        reason; several in a row end the run. The first inner step that is not finite is the last one tried. The entry
        has means over the inner steps that were taken, and their number.

        Args:
            samples: Scored samples for the objective (this rank's share).
            texts: Completions from the data, trained by cross-entropy (this rank's share).
        """
        masks = [find_valid_tokens(sample, self.objective, self.student.vocab_size) for sample in samples]
        unmasked = sum(int(sample.core.mask.sum()) for sample in samples)
        scored = sum(int(mask.sum()) for mask in masks)
        plain = sum(int(text.core.mask.sum()) for text in texts)
        scored, plain, unmasked = (
            sum(part) for part in zip(*self.ranks.gather((scored, plain, unmasked)), strict=True)
        )
        num_tokens = scored + plain
        passes: list[_Pass] = []
        with self.lock:
            rate = self._peak * compute_rate_factor(self.config, self.version, self.steps)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            while num_tokens and len(passes) < self.config.inner_steps and not (passes and passes[-1].skipped):
                passes.append(self._take_pass(samples, masks, texts, num_tokens))
            self.version += 1
        taken = [a_pass for a_pass in passes if not a_pass.skipped]
        counted = taken or passes or [_Pass("no trainable token")]
        losses = [sum(part) / len(counted) for part in zip(*(a_pass.losses for a_pass in counted), strict=True)]
        skipped = "" if taken else counted[0].skipped
        record: dict[str, Any] = {
            "loss": sum(losses),
            "grad_norm": sum(a_pass.norm for a_pass in counted) / len(counted),
            "lr": rate,
            "tokens": num_tokens,
            "masked_tokens": unmasked - scored,
            "skipped": skipped,
        }
        if self.config.inner_steps > 1:
            record |= {"passes": len(taken), "skipped_passes": self.config.inner_steps - len(taken)}
        if self._taid is not None:
            record["taid_t"] = self._taid.t
            if scored:  # a step on completions from the data alone has no loss for the schedule
                self._taid.update_t(losses[0] * num_tokens / scored, self.version - 1)
        if plain:
            record |= {"sft_tokens": plain, "sft_loss": losses[1] * num_tokens / plain}
        if self.ranks.size == 1:
            record |= counted[0].noise
        record |= batch_metrics(self.ranks.gather(sample_facts(samples, self.student.vocab_size)))
        # Direct losses use no ratio, so there is none to bound.
        importance = self.config.importance if self.objective.needs_behavior else ImportanceSampling(kind="none")
        gathered = [[part for rank in self.ranks.gather(a_pass.stats) for part in rank] for a_pass in counted]
        if measured := [token_metrics(stats, importance) for stats in gathered if stats]:
            record |= average_passes(measured)
            record["mismatch_kl"] = measured[0].get("behavior_kl_k3")
        self._count_skips(skipped)
        return record

    def _take_pass(
        self, samples: Sequence[PreparedSample], masks: Sequence[Any], texts: Sequence[TextSample], num_tokens: int
    ) -> _Pass:
        """Take one optimiser step on the whole batch."""
        result, noise = _Pass(), GradientNoise(num_tokens)
        with self._model.enable_training():
            self._backward(samples, masks, texts, num_tokens, result, noise)
        self._model.reduce_gradients()
        result.losses = [sum(part) for part in zip(*self.ranks.gather(result.losses), strict=True)]
        result.norm = clip_gradients(self._trained, self.config.max_grad_norm)
        if math.isfinite(result.norm) and math.isfinite(sum(result.losses)):
            self._optimizer.step()
            self._model.copy_to_student()
        else:
            result.skipped = "non-finite gradient"
        self._optimizer.zero_grad(set_to_none=True)
        result.noise = noise.metrics(result.norm)
        return result

    def _backward(  # noqa: PLR0917
        self,
        samples: Sequence[PreparedSample],
        masks: Sequence[Any],
        texts: Sequence[TextSample],
        num_tokens: int,
        result: _Pass,
        noise: GradientNoise,
    ) -> None:
        budget, device = self.config.micro_batch_tokens, self.student.device
        scored = list(make_micro_batches(samples, masks, budget, device))
        plain = list(make_micro_batches(texts, [text.core.mask for text in texts], budget, device))
        done = 0
        rounds = self._model.count_rounds(len(scored) + len(plain))
        for i in range(rounds):
            if i < len(scored):
                loss, tokens = compute_objective_loss(
                    self._loss,
                    score=self._model.score,
                    batch=scored[i],
                    importance=self.config.importance,
                    num_tokens=num_tokens,
                    vocab_size=self.student.vocab_size,
                    taid_t=1.0 if self._taid is None else self._taid.t,
                    stop_ids=self.stop_ids,
                )
                result.stats.append(tokens)
                result.losses[0] += float(loss.detach())
                done += scored[i].tokens
            elif i < len(scored) + len(plain):
                batch = plain[i - len(scored)]
                loss = compute_text_loss(self._model.score, batch, num_tokens)
                result.losses[1] += float(loss.detach())
                done += batch.tokens
            else:  # another rank has one more batch: make the same collective calls, learn nothing
                loss = self._model.score(
                    _make_empty_batch(device), torch.zeros(1, 1, dtype=torch.long, device=device)
                ).sum()
                loss = loss * 0.0
            scale = self._model.loss_scale
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            if i < len(scored):
                result.stats[-1].coefficient[:] = [value / scale for value in result.stats[-1].coefficient]
            if self.ranks.size == 1 and rounds > 1 and i == (rounds + 1) // 2 - 1:
                noise.small(self._trained, done)

    def state_dict(self) -> LearnerState:
        """Return all state except the weights; under FSDP2 every rank must call it."""
        values = {
            "version": self.version,
            "skipped_in_a_row": self._skipped_in_a_row,
            "objective": {} if self._taid is None else {"taid": self._taid.state_dict()},
        }
        return LearnerState(values, collect_optimizer_tensors(self._optimizer, self._model.named))

    def load_state_dict(self, state: LearnerState) -> None:
        """Restore the ``state_dict()`` of a learner with the same parameters; refuse any other.

        Load the student's weights first: they are used as they are now.
        """
        self._model.load_from_student()
        load_optimizer_tensors(self._optimizer, self._model.named, state.tensors)
        self.version = int(state.values["version"])
        self._skipped_in_a_row = int(state.values["skipped_in_a_row"])
        if self._taid is not None:
            if "taid" not in state.values["objective"]:
                raise ConfigError("the checkpoint was written with another objective", got="no TAID schedule")
            self._taid.load_state_dict(state.values["objective"]["taid"])

    def _count_skips(self, skipped: str) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{self._skipped_in_a_row} steps in a row were skipped",
                got=skipped,
                hint="lower learner.lr, or look at masked_tokens and lost samples in metrics.jsonl",
            )


def choose_precision(config: LearnerConfig, device: torch.device) -> Precision:
    """Choose the dtype of the forward pass; refuse bfloat16 on a GPU without it."""
    if config.autocast == "off":
        return Precision()
    if config.autocast == "auto" and not (device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return Precision()
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError('learner.autocast = "bfloat16": this GPU does not support it', hint='use "off" or "auto"')
    return Precision(torch.bfloat16, config.autocast_head)


def _make_scheduler(objective: Objective, steps: int | None) -> TAIDScheduler | None:
    if not isinstance(objective, TAID):
        return None
    if steps is None:
        raise ConfigError("objective taid needs the number of steps", hint="pass steps= to the learner")
    return TAIDScheduler(
        steps,
        t_start=objective.t_start,
        t_end=objective.t_end,
        alpha=objective.alpha,
        beta=objective.momentum,
        disable_adaptive=not objective.adaptive,
    )


def _make_empty_batch(device: torch.device) -> MicroBatch[TextSample]:
    mask = torch.ones(1, 1, dtype=torch.long, device=device)
    row = torch.zeros(1, dtype=torch.long, device=device)
    return MicroBatch([], mask, mask, row, row, [])
