"""Answers for an evaluation: drawn at a temperature of their own, never learnt from."""

from __future__ import annotations

import torch
from torch import Tensor

from topkd.engine.sampler import InProcessSampler
from topkd.topk.errors import ConfigError
from topkd.topk.samples import SamplingParams


class AnswerSampler(InProcessSampler):
    """Draws at any temperature; at 0 it takes the most likely token. The logprobs it states are at temperature 1."""

    def _check(self, params: SamplingParams) -> None:
        plain = SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            stop_token_ids=params.stop_token_ids,
            seed=params.seed,
        )
        if params != plain:
            raise ConfigError("an evaluation in this process samples at a temperature, untruncated", got=params)

    def _drawn(self, logp: Tensor, params: SamplingParams, generator: torch.Generator) -> Tensor:
        if params.temperature == 0.0:
            return logp.argmax(dim=-1, keepdim=True)
        scaled = torch.softmax(logp / params.temperature, dim=-1)
        return torch.multinomial(scaled, 1, generator=generator)
