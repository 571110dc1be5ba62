"""Policy-gradient objectives on the sampled token: importance sampling, PPO, IcePop. Natural logs, to be minimised.

``logp_behavior`` is the logprob under the distribution the token was *sampled* from: fixed for all inner steps, never
recomputed. Advantages are always detached. sg[x] is x, detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from topkd.topk.errors import ConfigError
from topkd.topk.losses.tokens import (
    Reduction,
    boolean_mask,
    check_finite,
    check_same,
    check_tensors,
    reduce_tokens,
    upcast,
)
from topkd.topk.maths.scalars import check_above_zero, check_real

LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8: a larger ratio has no information and may overflow


def importance_sampling_loss(
    logp_new: Tensor,
    logp_behavior: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cap: float | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """Importance-sampled policy gradient: dL/dlogp_new = -min(r, cap) * A, divided by the number of valid tokens.

    With ``cap`` the weight is truncated and detached, L = -(1/N) sum_t sg[min(r_t, cap)] A_t logp_new_t (SDPO, TRL). A
    clamp inside the graph would have no gradient above the cap. With ``cap=None`` L = -(1/N) sum_t r_t A_t, the plain
    form of Tinker's ``importance_sampling`` (which sums). Natural logs; A > 0 makes a token more likely;
    r = exp(clamp(logp_new - logp_behavior, -20, 20)). Unbiased without a cap; a cap adds bias.

    Args:
        logp_new: Logprob of the sampled tokens under the model being trained, any shape.
        logp_behavior: Exact logprob under the policy that sampled them, same shape.
        advantages: Advantage of each token, same shape.
        mask: bool, same shape, True = valid; None = all valid.
        cap: Upper bound of the ratio, or None for no bound. Truncation is biased; it trades bias for variance.
        reduction: "mean" divides by the valid tokens (0.0 when there is none); "sum" does not.
        num_tokens: Divide by this instead (valid tokens of the global batch under gradient accumulation).

    Returns:
        A scalar.
    """
    check_above_zero(cap=cap)
    new, behavior, advantage, valid = _select(logp_new, logp_behavior, advantages, mask)
    ratio = importance_ratio(new, behavior)
    if cap is None:
        # value r*A; the gradient is -r*A even where the log-ratio is clamped (a clamp in the graph would stop it)
        values = -(ratio * advantage * (1.0 + _tracked(new) - _tracked(new).detach()))
    else:
        values = -(ratio.clamp(max=cap) * advantage * _tracked(new))
    return reduce_tokens(values, valid, _known(reduction), num_tokens)


def ppo_clip_loss(
    logp_new: Tensor,
    logp_behavior: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float = 0.2,
    dual_clip: float | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """PPO's clipped surrogate: L = (1/N) sum max(-A r, -A clip(r, 1-clip, 1+clip)) (arXiv:1707.06347).

    ``dual_clip`` c > 1 bounds the loss of tokens with A < 0 at -A c (arXiv:1912.09729). Tokens outside the trust region
    get no gradient; this is intended: unlike in truncated importance sampling, the clip is part of the graph. r =
    exp(clamp(logp_new - logp_behavior, -20, 20)), natural logs; A > 0 makes a token more likely; at r = 1 the gradient
    is -A/N, elsewhere the clip adds bias.

    Args:
        logp_new: Logprob of the sampled tokens under the model being trained, any shape.
        logp_behavior: Exact logprob under the policy that sampled them.
        advantages: Advantage of each token.
        mask: bool, True = valid; None = all valid.
        clip: Half-width of the trust region, in (0, 1).
        dual_clip: Bound c > 1 for negative advantages, or None.
        reduction: "mean" divides by the valid tokens; "sum" does not.
        num_tokens: Divide by this instead.

    Returns:
        A scalar.
    """
    if not 0 < check_real("clip", clip) < 1:
        raise ConfigError("clip must lie in (0, 1)", got=clip)
    if dual_clip is not None and not check_real("dual_clip", dual_clip) > 1:
        raise ConfigError("dual_clip must be above 1", got=dual_clip)
    new, behavior, advantage, valid = _select(logp_new, logp_behavior, advantages, mask)
    ratio = (new - behavior).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    values = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    if dual_clip is not None:
        values = torch.where(advantage < 0, torch.minimum(values, -advantage * dual_clip), values)
    return reduce_tokens(values, valid, _known(reduction), num_tokens)


def icepop_loss(
    logp_new: Tensor,
    logp_behavior: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    low: float = 0.5,
    high: float = 5.0,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """IcePop: tokens whose ratio leaves [low, high] are dropped, the others weighted by it (arXiv:2510.18855).

    L = -(1/N) sum sg[r 1(low <= r <= high)] A logp_new. Dropped tokens still count in N, so that a mismatch between
    trainer and sampler makes the step smaller, and does not give the other tokens more weight. r = exp(logp_new -
    logp_behavior), natural logs; A > 0 makes a token more likely; biased by the dropped tokens, by design.

    Args:
        logp_new: Logprob of the sampled tokens under the model being trained, any shape.
        logp_behavior: Exact logprob under the policy that sampled them.
        advantages: Advantage of each token.
        mask: bool, True = valid; None = all valid.
        low: Smallest ratio that is kept.
        high: Largest ratio that is kept.
        reduction: "mean" divides by the valid tokens; "sum" does not.
        num_tokens: Divide by this instead.

    Returns:
        A scalar.
    """
    if not 0 <= check_real("low", low) < check_real("high", high):
        raise ConfigError("icepop needs 0 <= low < high", got=f"low {low}, high {high}")
    new, behavior, advantage, valid = _select(logp_new, logp_behavior, advantages, mask)
    ratio = importance_ratio(new, behavior)
    kept = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    return reduce_tokens(-(kept * advantage * _tracked(new)), valid, _known(reduction), num_tokens)


def reinforce_loss(
    logp_new: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """On-policy REINFORCE: L = -(1/N) sum sg[A] logp_new; correct only for tokens sampled from the model itself.

    Natural logs; A > 0 makes a token more likely; unbiased on-policy (Williams, 1992).

    Args:
        logp_new: Logprob of the sampled tokens under the model being trained, any shape.
        advantages: Advantage of each token.
        mask: bool, True = valid; None = all valid.
        reduction: "mean" divides by the valid tokens; "sum" does not.
        num_tokens: Divide by this instead.

    Returns:
        A scalar.
    """
    new, _, advantage, valid = _select(logp_new, logp_new, advantages, mask, behavior_known=False)
    return reduce_tokens(-(advantage * new), valid, _known(reduction), num_tokens)


def importance_ratio(logp_new: Tensor, logp_behavior: Tensor) -> Tensor:
    """Compute r = exp(clamp(logp_new - logp_behavior, -20, 20)), detached."""
    log_ratio = (logp_new - logp_behavior).detach()
    return torch.where(torch.isneginf(logp_new), 0.0, log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp())


def _tracked(logp_new: Tensor) -> Tensor:
    # a token that became impossible (-inf) has ratio 0; 0 * -inf would be nan
    return torch.where(torch.isneginf(logp_new), 0.0, logp_new)


def _select(
    logp_new: Tensor, logp_behavior: Tensor, advantages: Tensor, mask: Tensor | None, *, behavior_known: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_tensors(logp_new=logp_new)
    check_same("logp_new", logp_new.shape, logp_behavior=logp_behavior, advantages=advantages)
    valid = boolean_mask(mask, logp_new.shape, logp_new.device)
    if behavior_known:
        check_finite(valid, logp_behavior=logp_behavior, advantages=advantages)
    else:
        check_finite(valid, advantages=advantages)
    new = upcast(logp_new[valid])
    return new, logp_behavior.detach()[valid].to(new.dtype), advantages.detach()[valid].to(new.dtype), valid


def _known(reduction: Reduction) -> Reduction:
    if reduction not in ("mean", "sum"):
        raise ConfigError("unknown reduction", got=reduction, expected="mean or sum")
    return reduction
