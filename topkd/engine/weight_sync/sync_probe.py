"""Check that the sampler has the weights that were pushed: a few first tokens against the learner's own rows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from topkd.engine.models.student import Student
from topkd.topk import kl_k3
from topkd.topk.errors import SyncError
from topkd.topk.protocols import Ids, Sampler
from topkd.topk.samples import SamplingParams
from topkd.topk.types import Float32, Int32

DRAWS = 8  # tokens of each context
CONTEXTS = 4
_EXACT_NATS, _DRIFT_NATS = 1e-8, 1e-5  # float32 on both sides stays below the one; other weights soon exceed the other


@dataclass(frozen=True, slots=True)
class SyncProbe:
    """Contexts at which learner and sampler must give the same next-token distribution after every push.

    The learner's rows are taken when the weights are captured, so the comparison is of one version however far the
    learner is by the time that the sampler has it. ``kl`` is the mean of expm1(d) - d over the tokens drawn, with
    d = log learner - log sampler: an estimate of KL(sampler || learner) in nats, 0 but for rounding.

    Attributes:
        student: The learner's model.
        contexts: Prompts.
        alarm_nats: A KL above it is worth a warning.
        limit_nats: Above it the sampler is of other weights, or not the policy: a SyncError.
    """

    student: Student
    contexts: tuple[Int32, ...]
    alarm_nats: float = 0.02
    limit_nats: float = 1.0

    @classmethod
    def of(cls, student: Student, prompts: Sequence[Ids], **limits: float) -> SyncProbe:
        """Make a probe of a few of a run's prompts, spread over them."""
        places = np.unique(np.linspace(0, len(prompts) - 1, CONTEXTS).astype(int))
        return cls(student, tuple(np.asarray(prompts[place], dtype=np.int32) for place in places.tolist()), **limits)

    @torch.inference_mode()
    def rows(self) -> Float32:
        """Compute the learner's next-token logprobs at each context, float32 [contexts, V]."""
        found = []
        for context in self.contexts:  # one by one: a padded batch would round otherwise than the sampler does
            ids = torch.from_numpy(context.astype(np.int64))[None].to(self.student.device)
            at = torch.tensor([context.size - 1], device=self.student.device)
            logits = self.student.logit_rows(ids, torch.ones_like(ids), at)
            found.append(torch.log_softmax(logits.double(), dim=-1)[0].float().cpu().numpy())
        return np.stack(found)

    async def compare(
        self, sampler: Sampler, rows: Float32, params: SamplingParams, where: str, *, first_nats: float | None = None
    ) -> dict[str, Any]:
        """Compare the logprobs of tokens that the sampler draws now with the learner's ``rows``.

        Args:
            sampler: Who is asked.
            rows: The learner's, of the version that the sampler should have.
            params: Of the draws.
            where: The server, for messages.
            first_nats: The KL of the first push. Where the two agreed as float32 does, a part of the weights that is
                not taken up (an old output head) shows long before ``alarm_nats``. Of a bfloat16 student it says
                nothing: a fresh adapter adds exact zeros, and the first step's rounding is 1e-4.

        Raises:
            SyncError: They are not of the same distribution.
        """
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(sampler.sample(context, DRAWS, params)) for context in self.contexts]
        learner, served = [], []
        for row, task in zip(rows, tasks, strict=True):
            for rollout in task.result():
                learner.append(row[rollout.completion_ids[0]])
                served.append(rollout.logp[0])
        own_logp, served_logp = np.array(learner, dtype=np.float64), np.array(served, dtype=np.float64)
        kl, worst = float(np.mean(kl_k3(own_logp, served_logp))), float(np.abs(own_logp - served_logp).max())
        if not kl <= self.limit_nats:  # a NaN is above every limit
            raise SyncError(
                "the sampler does not sample from the weights that were pushed",
                where=where,
                got=f"KL {kl:.3g} nats, a token {worst:.3g} nats off",
                expected=f"at most {self.limit_nats:g}",
                hint="does it serve the student's own base model, untempered and unquantised?",
            )
        found: dict[str, Any] = {"sync_kl": kl, "sync_worst_nats": worst}
        float32 = self.student.head_parameters()[0].dtype == torch.float32
        exact = float32 and first_nats is not None and first_nats <= _EXACT_NATS
        alarm_nats = min(self.alarm_nats, _DRIFT_NATS) if exact else self.alarm_nats
        if kl > alarm_nats:
            found["alarms"] = [{"alarm": "sync_kl", "value": kl, "limit": alarm_nats}]
        return found
