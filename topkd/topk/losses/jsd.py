"""Generalised Jensen-Shannon distillation on whole vocabularies (GKD, arXiv:2306.13649; OPSD)."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from topkd.topk.errors import ConfigError
from topkd.topk.losses.divergence import clamp_value, divergence_terms, log_softmax
from topkd.topk.losses.tokens import FullReduction, check_logits, labels_mask, reduce_tokens, upcast
from topkd.topk.maths.scalars import check_above_zero, check_beta, check_positive, check_real

Tail: TypeAlias = Literal["bucket", "renormalise"]
_PROBABILITY_TOLERANCE = 1e-2  # wide enough for bf16 rows of any vocabulary, and far below a sum of logits


def generalized_jsd_loss(  # noqa: PLR0917 - the source's signature
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: FullReduction = "batchmean",
    logits_are_probs: bool = False,  # noqa: FBT001, FBT002
    top_k: int | None = None,
    token_clip: float | None = None,
    *,
    tail: Tail = "renormalise",
    per_token_clip: float | None = None,
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """Compute GJS_beta(T, S) = beta KL(T||M) + (1-beta) KL(S||M), averaged over valid tokens.

    M = beta T + (1-beta) S with beta the *teacher's* weight; beta = 0 is forward KL(T||S), beta = 1 reverse KL(S||T)
    (defined separately: the formula tends to 0 there). Both sides are divided by ``temperature``; there is no T^2
    factor. Natural logs, >= 0, to be minimised; GKD (arXiv:2306.13649). Exact except with ``top_k`` or the clips.

    Args:
        student_logits: [..., V]; the only argument that receives a gradient.
        teacher_logits: [..., V].
        labels: int [...] with -100 at ignored positions, or a boolean mask; None = every position counts.
        beta: Mixture weight of the teacher.
        temperature: Divides both logits; must be positive.
        reduction: "batchmean" and "mean" divide by the valid tokens; "sum"; "none" returns [...], 0 at masked
            positions.
        logits_are_probs: Both inputs are probabilities already (no temperature, no top_k).
        top_k: Compare only on the teacher's top_k ids (chosen after its temperature).
        token_clip: Upper bound of the summand of each (position, id). Name and behaviour are OPSD's: it does not clip
            tokens, and with beta 0 or 1 the sum can be negative.
        tail: With ``top_k``, "renormalise" compares the conditional distributions on those ids (OPSD; zero at top_k=1,
            ignores the mass outside), "bucket" adds the other ids as one bin (never above the dense value, grows with
            top_k).
        per_token_clip: Upper bound of each token's divergence.
        num_tokens: Divide by this instead of the valid tokens of this batch.

    Returns:
        A scalar, or [...] for reduction "none". nan where a valid row has no finite logit on one side, so is not a
        distribution.
    """
    check_beta(beta)
    if logits_are_probs and (temperature != 1.0 or top_k is not None):
        raise ConfigError("logits_are_probs takes neither a temperature nor top_k: both act on logits")
    check_options(temperature=temperature, top_k=top_k, tail=tail)
    check_above_zero(token_clip=token_clip, per_token_clip=per_token_clip)
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ConfigError(
            "student and teacher logits differ in shape",
            got=tuple(teacher_logits.shape),
            expected=tuple(student_logits.shape),
            hint="align the positions, and cut padded vocabularies to a common size",
        )
    mask = labels_mask(labels, student_logits.shape[:-1], student_logits.device)
    student, teacher = select_rows(student_logits, mask), select_rows(teacher_logits.detach(), mask)
    teacher = teacher.to(student.dtype)
    if logits_are_probs:
        student_logp, teacher_logp = _log_probabilities("student", student), _log_probabilities("teacher", teacher)
    else:
        student_logp, teacher_logp = _on_support(student / temperature, teacher / temperature, top_k, tail)
    terms = divergence_terms(teacher_logp, student_logp, beta)
    per_token = clamp_value(terms.sum(-1)) if token_clip is None else terms.clamp(max=token_clip).sum(-1)
    if per_token_clip is not None:
        per_token = per_token.clamp(max=per_token_clip)
    return reduce_tokens(per_token, mask, reduction, num_tokens)


def select_rows(logits: Tensor, mask: Tensor) -> Tensor:
    """Select [N, V] of the valid positions, in float32 (float64 stays)."""
    return upcast(logits[mask])


def _on_support(student: Tensor, teacher: Tensor, top_k: int | None, tail: Tail) -> tuple[Tensor, Tensor]:
    if top_k is None:
        return log_softmax(student, dead=math.nan), log_softmax(teacher, dead=math.nan)
    ids = teacher.topk(min(top_k, teacher.shape[-1]), dim=-1).indices
    if tail == "renormalise":
        student, teacher = student.gather(-1, ids), teacher.gather(-1, ids)
        return log_softmax(student, dead=math.nan), log_softmax(teacher, dead=math.nan)
    return _bucketed(log_softmax(student, dead=math.nan), ids), _bucketed(log_softmax(teacher, dead=math.nan), ids)


def _bucketed(logp: Tensor, ids: Tensor) -> Tensor:
    # the whole vocabulary is known: the tail is summed, because 1 - sum would lose digits
    rest = logp.scatter(-1, ids, -math.inf)
    empty = torch.isneginf(rest).all(-1, keepdim=True)
    tail = torch.logsumexp(torch.where(empty, 0.0, rest), -1).masked_fill(empty.squeeze(-1), -math.inf)
    return append_tail(logp.gather(-1, ids), tail)


def append_tail(logp: Tensor, tail_logp: Tensor) -> Tensor:
    """Append one more bin for everything outside the list: [..., K+1]."""
    return torch.cat([logp, tail_logp.unsqueeze(-1)], dim=-1)


def _log_probabilities(name: str, p: Tensor) -> Tensor:
    if p.numel() and bool(((p < 0).any()) | ((p.detach().sum(-1) - 1).abs() > _PROBABILITY_TOLERANCE).any()):
        raise ConfigError(f"{name}: logits_are_probs, but the rows are not probabilities that sum to 1")
    return torch.where(p > 0, torch.where(p > 0, p, 1.0).log(), -math.inf)


def check_options(*, temperature: float = 1.0, top_k: int | None = None, tail: str = "bucket") -> None:
    """Raise ConfigError if an option is out of range."""
    check_above_zero(temperature=check_real("temperature", temperature))
    if top_k is not None:
        check_positive("top_k", top_k)
    if tail not in ("bucket", "renormalise"):
        raise ConfigError("unknown tail", got=tail, expected="bucket or renormalise")
