"""In-process sampling: KV-cached, batched, with the exact log-probability of every sampled token.

``model.generate`` is not used: a model's ``generation_config`` (temperature, top_p, penalties) must have no effect, and
each token's logprob must come from exactly the distribution that it was sampled from.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkd.engine.models.student import Student, pad_sequences
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import Ids
from topkd.topk.samples import FinishReason, Rollout, SamplingParams
from topkd.topk.types import Float32, Int32, TopK, tail_logp


class InProcessSampler:
    """Sample from a student in this process; each rollout has the sampler's current ``version``.

    Args:
        student: The model. Weights are read under ``lock``, so a learner that steps under the same lock never changes
            them in the middle of a batch.
        stop_ids: Token ids that end a completion (kept in it, and scored).
        batch_size: Sequences decoded together.
        shown_k: The first ``SHOWN`` rollouts of a batch have lists of ``shown_k`` entries even if none were requested,
            to measure their overlap with the teacher's lists.
    """

    SHOWN = 8

    def __init__(
        self, student: Student, *, stop_ids: Sequence[int] = (), batch_size: int = 64, shown_k: int = 0
    ) -> None:
        self.student = student
        self.stop_ids = tuple(stop_ids)
        self.batch_size = batch_size
        self.shown_k = min(shown_k, student.vocab_size)
        self.version = ""
        self.lock = threading.Lock()

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """See ``topkd.topk.protocols.Sampler``."""
        return (await self.sample_batch([prompt_ids], n, params, k=k))[0]

    async def sample_batch(
        self, prompts: Sequence[Ids], n: int, params: SamplingParams, *, k: int = 0
    ) -> list[list[Rollout]]:
        """Sample n rollouts for each prompt; the same seed and prompts give the same rollouts."""
        given_up = threading.Event()
        try:
            return await asyncio.to_thread(self._sample_batch, prompts, n, params, k, given_up)
        except asyncio.CancelledError:
            given_up.set()  # the thread ends at its next token: a stopped run need not wait for the batch
            raise

    def _sample_batch(
        self,
        prompts: Sequence[Ids],
        n: int,
        params: SamplingParams,
        k: int,
        given_up: threading.Event | None = None,
    ) -> list[list[Rollout]]:
        given_up = given_up or threading.Event()
        self._check(params)
        if n < 1 or k < 0:
            raise ConfigError("n must be at least 1 and k at least 0", got=f"n = {n}, k = {k}")
        arrays = [array for prompt in prompts for array in [self.student.known(prompt).astype(np.int32)] * n]
        if any(array.size < 1 for array in arrays):
            raise ConfigError("a prompt needs at least one token", hint="add a BOS token or a first character")
        generator = torch.Generator()
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed)
        rollouts: list[Rollout] = []
        with self.lock, torch.inference_mode():
            for first in range(0, len(arrays), self.batch_size):
                if given_up.is_set():
                    return []
                part = arrays[first : first + self.batch_size]
                listed = len(part) if k else max(0, self.SHOWN - first) if self.shown_k else 0
                steps = self._decode(part, params, generator, given_up, k=k or self.shown_k, listed=listed)
                rollouts += self._rollouts(part, steps, params, listed)
        return [rollouts[i * n : (i + 1) * n] for i in range(len(prompts))]

    def _check(self, params: SamplingParams) -> None:
        if not params.exact:
            raise ConfigError("in-process sampling needs temperature 1, and no truncation or penalties", got=params)

    def _drawn(self, logp: Tensor, params: SamplingParams, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        return torch.multinomial(logp.exp(), 1, generator=generator)

    def _decode(
        self,
        prompts: list[Int32],
        params: SamplingParams,
        generator: torch.Generator,
        given_up: threading.Event,
        *,
        k: int,
        listed: int,
    ) -> list[_Step]:
        stops = torch.tensor([*self.stop_ids, *params.stop_token_ids], dtype=torch.long)
        ids, attention = pad_sequences(prompts, self.student.device, left=True)
        positions = (attention.cumsum(1) - 1).clamp_min(0)
        alive = torch.ones(len(prompts), dtype=torch.bool)
        steps: list[_Step] = []
        # The argument is "cache" since transformers 5.24; before, and in models with own code, "past_key_values".
        past = "cache" if "cache" in inspect.signature(self.student.backbone.forward).parameters else "past_key_values"
        kept: dict[str, Any] = {past: None}
        while len(steps) < params.max_tokens and bool(alive.any()) and not (steps and given_up.is_set()):
            output = self.student.backbone(
                input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=True, **kept
            )
            kept = {past: getattr(output, past)}
            logp = torch.log_softmax(self.student.head(output.last_hidden_state[:, -1]).float(), dim=-1).cpu()
            token = self._drawn(logp, params, generator)
            top = _top(logp[:listed], k) if listed else None
            steps.append(_Step(token[:, 0].numpy(), logp.gather(1, token)[:, 0].numpy(), top))
            alive &= ~torch.isin(token[:, 0], stops)
            ids = token.to(self.student.device)
            attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)
            positions = positions[:, -1:] + 1
        return steps

    def _rollouts(self, prompts: list[Int32], steps: list[_Step], params: SamplingParams, listed: int) -> list[Rollout]:
        stops = np.array([*self.stop_ids, *params.stop_token_ids], dtype=np.int64)
        token_BT = np.stack([step.token for step in steps], axis=1)
        logp_BT = np.stack([step.logp for step in steps], axis=1)
        lists = [step.top for step in steps if step.top is not None]
        rollouts = []
        for i, prompt in enumerate(prompts):
            ends = np.flatnonzero(np.isin(token_BT[i], stops))
            length = int(ends[0]) + 1 if ends.size else token_BT.shape[1]
            completion, logp, topk = token_BT[i, :length].astype(np.int32), logp_BT[i, :length], None
            if lists and i < listed:
                ids, values, tail = (np.stack([top[part][i] for top in lists[:length]]) for part in range(3))
                topk = TopK(prompt.size - 1, ids, values, completion, logp, tail)
            finish: FinishReason = "stop" if ends.size else "length"
            rollouts.append(Rollout(prompt, completion, logp, finish, params, topk, self.version))
        return rollouts


@dataclass(frozen=True, slots=True)
class _Step:
    """One decoding step of a batch: tokens [B], their logprobs [B], and the first rows' top-K (ids, logp, tail)."""

    token: NDArray[np.int64]
    logp: Float32
    top: tuple[Int32, Float32, Float32] | None


def _top(logp: Tensor, k: int) -> tuple[Int32, Float32, Float32]:
    if k > logp.shape[1]:
        raise ConfigError("K is above the student's vocabulary", got=k, expected=f"at most {logp.shape[1]}")
    values, ids = logp.topk(k, dim=1)
    return ids.numpy().astype(np.int32), values.numpy(), tail_logp(values.double().numpy())


class AnswerSampler(InProcessSampler):
    """Sample at any temperature; at 0, take the most likely token. Logprobs are those of temperature 1."""

    def _check(self, params: SamplingParams) -> None:
        if not replace(params, temperature=1.0).exact:
            raise ConfigError(
                "an in-process evaluation can use any temperature, but no truncation or penalties", got=params
            )

    def _drawn(self, logp: Tensor, params: SamplingParams, generator: torch.Generator) -> Tensor:
        if params.temperature == 0.0:
            return logp.argmax(dim=-1, keepdim=True)
        scaled = torch.softmax(logp / params.temperature, dim=-1)
        return torch.multinomial(scaled, 1, generator=generator)
