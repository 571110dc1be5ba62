"""Sequences that generate together: one padded key-value cache, one forward pass a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topkd.serve.engine.jobs import Completion, EngineJob, SamplingJob
from topkd.serve.engine.scoring import count_true
from topkd.serve.model.backbone import Backbone


@dataclass(slots=True, eq=False)
class GeneratedSequence:
    """One completion in progress."""

    job: EngineJob
    index: int
    limit: int  # tokens it may draw: max_tokens, or the room left in the context
    stops: frozenset[int]  # end-of-sequence ids and stop_token_ids
    generator: np.random.Generator
    out: Completion = field(default_factory=Completion)
    done: bool = False
    searched: int = 0  # characters of its text that were searched for stop strings

    @property
    def sampling(self) -> SamplingJob:
        """How it is drawn."""
        return self.job.sampling

    @property
    def tokens(self) -> list[int]:
        """Prompt and completion so far."""
        return [*self.job.ids, *self.out.token_ids]


def draw_next(sequences: Sequence[GeneratedSequence], logits_BV: Tensor, *, processed: bool, version: str) -> None:
    """Append one token to each sequence, with its logprob, its rank and the top K it asked for.

    Logprobs are of the model's own distribution, or with ``processed`` of the one that was drawn from.
    """
    drawn_from, shown = [], []
    for row, sequence in enumerate(sequences):
        sampling, logits = sequence.sampling, logits_BV[row]
        if not (is_untouched(sampling) and (sampling.greedy or sampling.temperature == 1.0)):
            logits = process_logits(logits, sampling, sequence.job.ids, sequence.out.token_ids, sequence.stops)
        drawn_from.append(logits)
        scaled = sampling.scaled_logprobs and not sampling.greedy and not processed
        shown.append(logits_BV[row] / sampling.temperature if scaled else logits if processed else logits_BV[row])
    tokens_B1 = draw_tokens(_stack(drawn_from, logits_BV), sequences)
    shown_BV = _stack(shown, logits_BV)
    lse_B1 = shown_BV.logsumexp(-1, keepdim=True)
    chosen_B1 = shown_BV.gather(1, tokens_B1)
    picked, logp = tokens_B1[:, 0].tolist(), (chosen_B1 - lse_B1)[:, 0].tolist()
    rank = count_true(shown_BV >= chosen_B1).tolist()
    wide = max(sequence.sampling.logprobs or 0 for sequence in sequences)
    top = shown_BV.topk(wide, dim=-1) if wide else None
    top_ids = None if top is None else top.indices.cpu().numpy()
    top_logp = None if top is None else (top.values - lse_B1).cpu().numpy()
    for row, sequence in enumerate(sequences):
        out = sequence.out
        out.token_ids.append(picked[row])
        out.logp.append(logp[row])
        out.rank.append(rank[row])
        out.versions.append(version)
        wanted = sequence.sampling.logprob_token_ids
        if wanted:
            ids = torch.tensor(wanted, device=shown_BV.device)
            values = shown_BV[row, ids]
            out.top_ids.append(np.asarray(wanted, dtype=np.int64))
            out.top_logp.append((values - lse_B1[row]).cpu().numpy())
            out.top_rank.append((shown_BV[row][None] >= values[:, None]).sum(-1).cpu().numpy())
        elif sequence.sampling.logprobs and top_ids is not None and top_logp is not None:
            k = sequence.sampling.logprobs
            out.top_ids.append(top_ids[row, :k])
            out.top_logp.append(top_logp[row, :k])
            out.top_rank.append(np.arange(1, k + 1))


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


def draw_tokens(logits_BV: Tensor, sequences: Sequence[GeneratedSequence]) -> Tensor:
    """Draw a token for each row, [B, 1]: argmax, or the place of a uniform number in the row's cumulated probabilities.

    A row takes one number from its own generator, so a draw depends on nothing else in the batch.
    """
    greedy = [sequence.sampling.greedy for sequence in sequences]
    if all(greedy):
        return logits_BV.argmax(-1, keepdim=True)
    numbers = [0.0 if sequence.sampling.greedy else sequence.generator.random() for sequence in sequences]
    device = torch.device("cpu") if logits_BV.device.type == "mps" else logits_BV.device  # mps has no float64
    points_B1 = torch.tensor(numbers, dtype=torch.float64, device=device)[:, None]
    cumulated_BV = logits_BV.softmax(-1).to(device).double().cumsum(-1)
    total_B1 = cumulated_BV[:, -1:]
    # Below the total, so that a token of probability zero at the end is never the place. NaN finds no place at all; it
    # is refused with the logprob.
    points_B1 = torch.minimum(points_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    tokens_B1 = torch.searchsorted(cumulated_BV, points_B1, right=True).clamp_(max=logits_BV.shape[-1] - 1)
    tokens_B1 = tokens_B1.to(logits_BV.device)
    if any(greedy):
        is_greedy_B1 = torch.tensor(greedy, device=logits_BV.device)[:, None]
        tokens_B1 = torch.where(is_greedy_B1, logits_BV.argmax(-1, keepdim=True), tokens_B1)
    return tokens_B1


def _stack(rows: list[Tensor], logits_BV: Tensor) -> Tensor:
    """Stack the rows, or return the matrix that all of them are rows of."""
    untouched = all(row.data_ptr() == own.data_ptr() for row, own in zip(rows, logits_BV, strict=True))
    return logits_BV if untouched else torch.stack(rows)


class SequenceGroup:
    """Sequences of one adapter with stacked, right-aligned caches.

    The last drawn token of each sequence is not in the cache yet: the next step feeds it.
    """

    def __init__(self, backbone: Backbone, adapter: str | None, sequences: list[GeneratedSequence], cache: Any) -> None:
        self.backbone, self.adapter, self.sequences, self.cache = backbone, adapter, sequences, cache

    @classmethod
    def after_prefill(
        cls, backbone: Backbone, adapter: str | None, sequences: list[GeneratedSequence], cache: Any, rows: list[int]
    ) -> SequenceGroup:
        """Build a group from a right-padded prefill batch: row ``rows[i]`` of its cache belongs to ``sequences[i]``."""
        index = torch.tensor(rows, device=backbone.device)
        cache.batch_select_indices(index)
        group = cls(backbone, adapter, sequences, cache)
        group._align()
        return group

    @property
    def width(self) -> int:
        """Cached positions of each row, padding included."""
        return int(self.cache.get_seq_length())

    def _cached(self, sequence: GeneratedSequence) -> int:
        return len(sequence.job.ids) + len(sequence.out.token_ids) - 1

    def _align(self) -> None:
        """Move every row's real positions to the right end."""
        lengths = [self._cached(sequence) for sequence in self.sequences]
        width, longest = self.width, max(lengths)
        if min(lengths) == width:
            return
        # Only plain attention caches ever hold padding: keys carry their positions with them, so rows can be shifted.
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(*old.shape[:2], longest, old.shape[3])
                for row, length in enumerate(lengths):
                    new[row, :, longest - length :] = old[row, :, :length]
                setattr(layer, name, new)

    def absorb(self, other: SequenceGroup) -> None:
        """Add another group's sequences to this one."""
        width = max(self.width, other.width)
        for mine, added in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                parts = [
                    torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))
                    for tensor in (getattr(mine, name), getattr(added, name))
                ]
                setattr(mine, name, torch.cat(parts))
        self.sequences += other.sequences

    def step(self, *, processed: bool, version: str) -> None:
        """Draw one token for every sequence."""
        device = self.backbone.device
        lengths = [self._cached(sequence) for sequence in self.sequences]
        last = torch.tensor([[s.out.token_ids[-1]] for s in self.sequences], device=device)
        positions = torch.tensor(lengths, device=device)[:, None]
        width = self.width
        options: dict[str, Any] = {}
        if min(lengths) < width:
            slots = torch.arange(width + 1, device=device)[None]
            options["attention_mask"] = (slots >= width - positions).long()
        hidden = self.backbone.hidden(last, cache=self.cache, position_ids=positions, **options)
        draw_next(self.sequences, self.backbone.logits(hidden[:, -1]), processed=processed, version=version)

    def drop_done(self) -> None:
        """Drop finished sequences and the padding that only they needed."""
        keep = [row for row, sequence in enumerate(self.sequences) if not sequence.done]
        if len(keep) == len(self.sequences):
            return
        self.sequences = [self.sequences[row] for row in keep]
        if not keep:
            return
        self.cache.batch_select_indices(torch.tensor(keep, device=self.backbone.device))
        spare = self.width - max(self._cached(sequence) for sequence in self.sequences)
        if spare > 0 and self.backbone.mixes_lengths:
            for layer in self.cache.layers:
                layer.keys = layer.keys[:, :, spare:]
                layer.values = layer.values[:, :, spare:]
