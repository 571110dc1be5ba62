"""Drawing of the next token: penalties, temperature, truncation, and a generator for each sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from topkd.serve.engine.jobs import SamplingJob


def process_logits(
    logits_V: Tensor, sampling: SamplingJob, prompt: Sequence[int], drawn: Sequence[int], stops: frozenset[int]
) -> Tensor:
    """Apply restrictions, penalties, temperature and truncation in vLLM's order; return new logits.

    Greedy requests skip temperature and truncation: argmax does not see them.
    """
    logits = logits_V.clone()
    if sampling.allowed_token_ids:
        keep = torch.zeros_like(logits, dtype=torch.bool)
        keep[list(sampling.allowed_token_ids)] = True
        logits.masked_fill_(~keep, -torch.inf)
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    if stops and len(drawn) < sampling.min_tokens:
        logits[sorted(stops)] = -torch.inf
    _penalise(logits, sampling, prompt, drawn)
    if sampling.greedy:
        return logits
    if sampling.temperature != 1.0:
        logits /= sampling.temperature
    if sampling.min_p > 0:
        floor = logits.max() + math.log(sampling.min_p)
        logits.masked_fill_(logits < floor, -torch.inf)
    if 0 < sampling.top_k < logits.numel():
        logits.masked_fill_(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        values, order = logits.sort()  # ascending: drop the unlikely end while what is dropped stays within 1 - top_p
        dropped = values.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[-1] = False
        logits[order[dropped]] = -torch.inf
    return logits


def _penalise(logits: Tensor, sampling: SamplingJob, prompt: Sequence[int], drawn: Sequence[int]) -> None:
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *drawn}), dtype=torch.long, device=logits.device)
        values = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if drawn and (sampling.frequency_penalty or sampling.presence_penalty):
        counts = torch.bincount(torch.tensor(drawn, device=logits.device), minlength=logits.numel())
        logits -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)


def is_untouched(sampling: SamplingJob) -> bool:
    """Return whether the processed distribution is the model's own, but for the temperature."""
    return (
        sampling.top_p >= 1
        and sampling.top_k <= 0
        and sampling.min_p <= 0
        and sampling.min_tokens <= 0
        and not sampling.presence_penalty
        and not sampling.frequency_penalty
        and sampling.repetition_penalty == 1.0
        and not sampling.logit_bias
        and not sampling.allowed_token_ids
    )


def draw_tokens(logits_V: Tensor, greedy: bool, generator: torch.Generator) -> int:  # noqa: FBT001 - a property of the row
    """Draw one token: argmax, or an exact draw from softmax(logits) by a race of exponentials (Gumbel's trick).

    A race needs one random number per token and no normaliser, so a draw depends on its own row and generator only,
    never on what else is in the batch.
    """
    if greedy:
        return int(logits_V.argmax())
    race = torch.empty(logits_V.shape, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
    # 0 has probability zero but is a possible float: it would win every race, -inf rows included.
    race = race.clamp_(min=torch.finfo(torch.float64).tiny).log_().to(logits_V.device, torch.float32)
    return int((logits_V - race).argmax())
