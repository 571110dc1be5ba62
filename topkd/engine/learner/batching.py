"""Pad samples of different lengths into micro-batches, and find their trained positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkd.engine.models.student import pad_sequences
from topkd.topk.samples import PreparedSample, TextSample
from topkd.topk.types import Bool

S = TypeVar("S", bound=PreparedSample | TextSample)


@dataclass(frozen=True, slots=True)
class MicroBatch(Generic[S]):
    """A right-padded batch, and its flat positions that train.

    Attributes:
        samples: The samples, in batch order.
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T].
        rows: int64 [N], flat positions b * T + t of logit rows that predict a trained completion token.
        targets: int64 [N], the token each row should have predicted.
        picks: Per sample, the completion positions of its rows (in order), to select its logprobs and lists.
    """

    samples: list[S]
    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    targets: Tensor
    picks: list[NDArray[np.intp]]

    @property
    def tokens(self) -> int:
        """The number of trained tokens, N."""
        return int(self.rows.shape[0])


def make_micro_batches(
    samples: Sequence[S], masks: Sequence[Bool], budget_tokens: int, device: torch.device
) -> Iterator[MicroBatch[S]]:
    """Yield batches of similar lengths, padded to at most ``budget_tokens`` (a longer sample is a batch of its own).

    ``masks`` say per sample which completion tokens train; samples with none are left out.
    """
    order = sorted(
        ((sample, mask) for sample, mask in zip(samples, masks, strict=True) if mask.any()),
        key=lambda pair: pair[0].core.full_ids.size,
    )
    group: list[tuple[S, Bool]] = []
    for pair in order:
        if group and (len(group) + 1) * pair[0].core.full_ids.size > budget_tokens:
            yield _pad(group, device)
            group = []
        group.append(pair)
    if group:
        yield _pad(group, device)


def _pad(pairs: list[tuple[S, Bool]], device: torch.device) -> MicroBatch[S]:
    samples = [sample for sample, _ in pairs]
    input_ids, attention = pad_sequences([sample.core.input_ids for sample in samples], device)
    rows, targets, picks = [], [], []
    for b, (sample, mask) in enumerate(pairs):
        core, pick = sample.core, np.flatnonzero(mask)
        picks.append(pick)
        rows.append(
            b * input_ids.shape[1] + core.prompt_len - 1 + pick
        )  # row P - 1 predicts the first completion token
        targets.append(core.completion_ids[pick].astype(np.int64))
    return MicroBatch(
        samples,
        input_ids,
        attention,
        torch.from_numpy(np.concatenate(rows)).to(device),
        torch.from_numpy(np.concatenate(targets)).to(device),
        picks,
    )
