"""Cross-entropy against the teacher (KDLoss), or against a target that moves towards the teacher (TAID)."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from topkd.topk.errors import ConfigError
from topkd.topk.losses.divergence import log_softmax
from topkd.topk.losses.jsd import select_rows
from topkd.topk.losses.tokens import boolean_mask, check_logits, check_same, check_tensors, labels_mask, reduce_mean
from topkd.topk.maths.scalars import check_fraction


class KDLoss(torch.nn.Module):
    """CE(softmax(z_T), log_softmax(z_S)) = KL(T||S) + H(T), averaged over tokens whose label is not -100.

    Label i belongs to row i; ``shift=True`` pairs row i with label i + 1, as a causal model needs. Ids at which the
    student's logit is -inf are left out of the sum. Without a valid label the loss is 0. Natural logs; exact; the
    gradient is that of forward KL (Hinton et al., arXiv:1503.02531).
    """

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
        """Compute the loss, and with ``return_metrics`` also {"kl": mean KL(T||S)}, which can reach zero.

        The metric is the loss minus H(T). An id to which only the student gives probability zero (-inf) is left out of
        the loss, so the metric is finite where the KL would be infinite.

        Args:
            logits: Student, [..., T, V].
            teacher_logits: [..., T, V], detached.
            label: int [..., T], -100 = ignored, or a boolean mask.
            shift: Pair row i with label i + 1 (labels as from a tokenizer).
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


@overload
def taid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    t: float,
    num_tokens: float | Tensor | None = None,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def taid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    t: float,
    num_tokens: float | Tensor | None = None,
    return_metrics: Literal[True],
) -> tuple[Tensor, dict[str, float]]: ...
def taid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    t: float,
    num_tokens: float | Tensor | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, float]]:
    """Compute CE(p_t, S), p_t = softmax((1-t) z_S + t z_T) with z_S detached, averaged over valid tokens.

    The value at T = S is the entropy H(p_t), not 0; the gradient is s - p_t. t = 0 has a zero gradient, t = 1 is the
    gradient of forward KL(T||S). At t = 0 and 1 the part with weight zero is left out (0 * -inf is nan). Ids at which
    the student's logit is -inf are left out of the sum, as in KDLoss. Natural logs; exact (arXiv:2501.16937).

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], detached.
        mask: bool [...], True = valid; None = all valid.
        t: Interpolation weight of the teacher, in [0, 1]; see TAIDScheduler.
        num_tokens: Divide by this instead of the valid tokens of this batch.
        return_metrics: Also return {"kl": mean KL(p_t||S), "t": t}, because the cross-entropy cannot be compared
            between values of t. It is the loss minus H(p_t); ids with student probability zero are left out, as in the
            loss.

    Returns:
        A scalar, or (scalar, metrics).
    """
    check_fraction("t", t)
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    check_same("student_logits", student_logits.shape, teacher_logits=teacher_logits)
    valid = boolean_mask(mask, student_logits.shape[:-1], student_logits.device)
    student = select_rows(student_logits, valid)
    target_logp = log_softmax(blend(student.detach(), select_rows(teacher_logits.detach(), valid), t))
    per_token = cross_entropy(target_logp, student)
    loss = reduce_mean(per_token, per_token.shape[0], num_tokens)
    if not return_metrics:
        return loss
    kl = reduce_mean(per_token.detach() - entropy(target_logp), per_token.shape[0], num_tokens)
    return loss, {"kl": float(kl), "t": float(t)}


def cross_entropy(target_logp: Tensor, student_logits: Tensor) -> Tensor:
    """Compute -sum_v p(v) log s(v) over the last axis; ids with p = 0 or s = 0 add nothing."""
    student_logp = log_softmax(student_logits)
    used = ~(torch.isneginf(target_logp) | torch.isneginf(student_logp))
    target = torch.where(used, target_logp, 0.0).exp()
    return -torch.where(used, target * torch.where(used, student_logp, 0.0), 0.0).sum(-1)


def entropy(logp: Tensor) -> Tensor:
    """Compute H = -sum p log p over the last axis, in nats."""
    listed = ~torch.isneginf(logp)
    safe = torch.where(listed, logp, 0.0)
    return -torch.where(listed, safe.exp() * safe, 0.0).sum(-1)


def blend(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """Compute (1-t) student + t teacher; a part with weight zero is left out (0 * -inf is nan)."""
    teacher = teacher.to(student.dtype)
    if t == 0.0:
        return student
    if t == 1.0:
        return teacher
    return (1.0 - t) * student + t * teacher
