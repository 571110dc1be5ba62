"""KDLoss: cross-entropy against the teacher's distribution, the classical distillation loss (arXiv:1503.02531)."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from topkd.topk.errors import ConfigError
from topkd.topk.losses.divergence import log_softmax
from topkd.topk.losses.jsd import select_rows
from topkd.topk.losses.taid import cross_entropy, entropy
from topkd.topk.losses.tokens import check_logits, check_same, check_tensors, labels_mask, reduce_mean


class KDLoss(torch.nn.Module):
    """CE(softmax(z_T), log_softmax(z_S)) = KL(T||S) + H(T), averaged over tokens whose label is not -100.

    The label stands at the row whose logits it judges: nothing is shifted unless ``shift=True``, which pairs row i with
    label i + 1 as a causal model needs. Ids at which the student's logit is -inf are left out of the sum. No valid
    label gives 0. Natural logs; exact; the gradient is that of forward KL (Hinton et al., arXiv:1503.02531).
    """

    @overload
    def forward(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        label: Tensor | None,
        *,
        shift: bool = False,
        num_tokens: float | Tensor | None = None,
        return_metrics: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        label: Tensor | None,
        *,
        shift: bool = False,
        num_tokens: float | Tensor | None = None,
        return_metrics: Literal[True],
    ) -> tuple[Tensor, dict[str, float]]: ...
    def forward(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        label: Tensor | None,
        *,
        shift: bool = False,
        num_tokens: float | Tensor | None = None,
        return_metrics: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, float]]:
        """The loss, and with ``return_metrics`` also {"kl": mean KL(T||S)}: the part that can reach zero.

        That metric is the loss minus H(T). An id of the teacher's that the student excludes (-inf) is left out of the
        loss, and so makes the metric too small by what it should have been: infinite.

        Args:
            logits: Student, [..., T, V].
            teacher_logits: [..., T, V], detached.
            label: int [..., T], -100 = ignored, or a boolean mask.
            shift: Judge row i by label i + 1 (labels as a tokenizer gives them).
            num_tokens: Divide by this instead of the valid tokens of this batch.
            return_metrics: Also return the metrics.
        """
        check_logits(logits=logits, teacher_logits=teacher_logits)
        check_same("logits", logits.shape, teacher_logits=teacher_logits)
        if shift:
            if label is None or logits.dim() < 2:
                raise ConfigError("shift=True needs logits [..., T, V] and labels [..., T]")
            check_tensors(label=label)
            logits, teacher_logits, label = logits[..., :-1, :], teacher_logits[..., :-1, :], label[..., 1:]
        mask = labels_mask(label, logits.shape[:-1], logits.device)
        student, teacher = select_rows(logits, mask), select_rows(teacher_logits.detach(), mask)
        target_logp = log_softmax(teacher.to(student.dtype))
        per_token = cross_entropy(target_logp, student)
        loss = reduce_mean(per_token, per_token.shape[0], num_tokens)
        if not return_metrics:
            return loss
        kl = reduce_mean(per_token.detach() - entropy(target_logp), per_token.shape[0], num_tokens)
        return loss, {"kl": float(kl)}
