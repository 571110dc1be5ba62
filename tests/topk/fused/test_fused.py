"""The fused head: the same numbers and gradients as dense logits, in every chunk size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tests.topk.heads import SHAPES, gradients, head, mixed, rows_of
from topkd.topk.errors import ConfigError
from topkd.topk.fused import fused_row_loss, gather_logprobs, subset_logits, topk_logprobs
from topkd.topk.losses import (
    fused_divergence_loss,
    fused_topk_policy_gradient_loss,
    sparse_divergence_loss,
    topk_policy_gradient_loss,
)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_logprobs_and_gradients_equal_dense_for_every_chunk_size(
    shape: tuple[int, int, int, int], with_bias: bool
) -> None:
    x = head(shape)
    bias = x["bias"] if with_bias else None
    logits = x["hidden"] @ x["weight"].t() + x["bias"] * with_bias
    logp, lse = gather_logprobs(logits, x["ids"])
    wanted = gradients(mixed(logp, x["ids"], lse), x)
    reference = torch.log_softmax(logits, -1).gather(-1, x["ids"].clamp(min=0))
    torch.testing.assert_close(logp, reference.masked_fill(x["ids"] < 0, -math.inf), atol=1e-13, rtol=1e-13)
    for chunk in (None, 1, 10, shape[2]):
        logp, lse = topk_logprobs(x["hidden"], x["weight"], x["ids"], bias=bias, chunk=chunk)
        torch.testing.assert_close(logp, reference.masked_fill(x["ids"] < 0, -math.inf), atol=1e-13, rtol=1e-13)
        torch.testing.assert_close(lse, torch.logsumexp(logits, -1), atol=1e-13, rtol=1e-13)
        loss = mixed(logp, x["ids"], lse) + 0.0 * x["bias"].sum()
        for got, want in zip(gradients(loss, x), wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_loss_has_the_dense_gradients_for_every_chunk_size(shape: tuple[int, int, int, int]) -> None:
    x = head(shape)
    weights = torch.linspace(-1, 2, x["ids"].numel(), dtype=torch.float64).reshape(x["ids"].shape)

    def row_loss(logp: Tensor, lse: Tensor, rows: slice) -> Tensor:
        return (weights[rows] * torch.where(x["ids"][rows] >= 0, logp, 0.0).exp()).sum(-1)

    dense, lse = gather_logprobs(x["hidden"] @ x["weight"].t() + x["bias"], x["ids"])
    reference = row_loss(dense, lse, slice(None)).sum()
    wanted = gradients(3.0 * reference, x)
    for chunk in (None, 1, 5, shape[0]):
        loss = 3.0 * fused_row_loss(x["hidden"], x["weight"], x["ids"], row_loss, bias=x["bias"], chunk=chunk)
        assert loss.item() == pytest.approx(3.0 * reference.item(), rel=1e-12)
        for got, want in zip(gradients(loss, x), wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_subset_logits_equal_the_gathered_columns(shape: tuple[int, int, int, int]) -> None:
    x = head(shape)
    slope = torch.linspace(-1, 2, x["ids"].numel(), dtype=torch.float64).reshape(x["ids"].shape)

    def total(z: Tensor) -> Tensor:
        return (slope * torch.where(x["ids"] >= 0, z, 0.0)).sum()

    dense = (x["hidden"] @ x["weight"].t() + x["bias"]).gather(-1, x["ids"].clamp(min=0))
    ours = subset_logits(x["hidden"], x["weight"], x["ids"], bias=x["bias"])
    torch.testing.assert_close(ours, dense.masked_fill(x["ids"] < 0, -math.inf), atol=1e-13, rtol=1e-13)
    for got, want in zip(gradients(total(ours), x), gradients(total(dense), x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_finite_differences_agree_with_every_route() -> None:
    x = head((4, 3, 11, 2))
    inputs = (x["hidden"], x["weight"], x["bias"])
    ids = x["ids"].clamp(min=0)
    assert gradcheck(lambda h, w, b: topk_logprobs(h, w, ids, bias=b, chunk=4), inputs)
    assert gradcheck(lambda h, w, b: subset_logits(h, w, ids, bias=b), inputs)
    assert gradcheck(lambda z: gather_logprobs(z, ids), (torch.randn(4, 11, dtype=torch.float64, requires_grad=True),))
    rows = rows_of(ids, 11)

    def fused(h: Tensor, w: Tensor) -> Tensor:
        return fused_divergence_loss(h, w, rows, chunk=3)

    analytic = torch.autograd.grad(fused(*inputs[:2]), inputs[:2])
    step = 1e-6
    for which, gradient in enumerate(analytic):
        for index in torch.randperm(gradient.numel(), generator=torch.Generator().manual_seed(0))[:8].tolist():
            moved = [[t.detach().clone() for t in inputs[:2]] for _ in range(2)]
            moved[0][which].view(-1)[index] += step
            moved[1][which].view(-1)[index] -= step
            numeric = (fused(*moved[0]) - fused(*moved[1])).item() / (2 * step)
            assert numeric == pytest.approx(gradient.view(-1)[index].item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_fused_divergence_is_the_one_on_logits(beta: float, tail: Any) -> None:
    x = head((23, 6, 61, 5))
    rows = rows_of(x["ids"], 61)
    mask = torch.arange(23) % 3 != 0
    logits = x["hidden"] @ x["weight"].t() + x["bias"]
    wanted = sparse_divergence_loss(logits, rows, mask, beta=beta, tail=tail)
    ours = fused_divergence_loss(x["hidden"], x["weight"], rows, mask, bias=x["bias"], beta=beta, tail=tail, chunk=4)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-12)
    for got, want in zip(gradients(ours, x), gradients(wanted, x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_fused_policy_gradient_is_the_one_on_logprobs(beta: float, lam: float) -> None:
    x = head((23, 6, 61, 5))
    rows = rows_of(x["ids"], 61)
    rows.actual_logp[4] = math.nan
    mask = torch.arange(23) % 5 != 0
    logp = torch.log_softmax(x["hidden"] @ x["weight"].t() + x["bias"], -1)
    chosen = logp.gather(-1, rows.actual_ids[:, None])[:, 0]
    behavior = chosen.detach() - torch.linspace(-1, 1, 23, dtype=torch.float64)
    at_ids = logp.gather(-1, rows.ids.clamp(min=0))
    wanted, metrics = topk_policy_gradient_loss(
        at_ids, chosen, rows, mask, beta=beta, lam=lam, behavior_logp=behavior, return_metrics=True
    )
    ours = fused_topk_policy_gradient_loss(
        x["hidden"], x["weight"], rows, mask, bias=x["bias"], beta=beta, lam=lam, behavior_logp=behavior, chunk=4
    )
    assert ours.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert ours.metrics == pytest.approx(metrics)
    torch.testing.assert_close(ours.student_logp, chosen[ours.used].detach())
    for got, want in zip(gradients(ours.loss, x), gradients(wanted, x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_nothing_valid_is_zero_with_zero_gradients() -> None:
    x = head((6, 4, 20, 2))
    rows = rows_of(x["ids"], 20)
    none = torch.zeros(6, dtype=torch.bool)
    losses = [
        fused_divergence_loss(x["hidden"], x["weight"], rows, none),
        fused_divergence_loss(x["hidden"], x["weight"], rows, none, tail="renormalise"),
        fused_topk_policy_gradient_loss(x["hidden"], x["weight"], rows, none).loss,
        sparse_divergence_loss(x["hidden"] @ x["weight"].t(), rows, none),
    ]
    for loss in losses:
        assert loss.item() == 0.0
        assert not any(g.any() for g in torch.autograd.grad(loss, [x["hidden"], x["weight"]]))


def test_ids_masked_out_of_the_vocabulary_by_the_bias_carry_no_nan() -> None:
    x = head((9, 4, 40, 3))
    bias = x["bias"].detach().clone()
    bias[30:] = -math.inf
    ids = x["ids"].clamp(min=0) % 30
    ids[:, 1], ids[:, 2] = (ids[:, 0] + 7) % 30, (ids[:, 0] + 13) % 30
    rows = rows_of(ids, 30)
    cut = fused_divergence_loss(x["hidden"], x["weight"][:30], rows, bias=bias[:30])
    wide = fused_divergence_loss(x["hidden"], x["weight"], rows, bias=bias)
    assert wide.item() == pytest.approx(cut.item(), rel=1e-12)
    for loss in (wide, topk_logprobs(x["hidden"], x["weight"], ids, bias=bias, chunk=8)[0].sum()):
        for gradient in torch.autograd.grad(loss, [x["hidden"], x["weight"]]):
            assert torch.isfinite(gradient).all()


def test_losses_accumulated_by_global_tokens_add_up() -> None:
    x = head((12, 8, 90, 3))
    rows = rows_of(x["ids"], 90)
    whole = fused_divergence_loss(x["hidden"], x["weight"], rows)
    parts = sum(
        fused_divergence_loss(x["hidden"][i : i + 4], x["weight"], rows.rows(slice(i, i + 4)), num_tokens=12)
        for i in (0, 4, 8)
    )
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    for got, want in zip(
        torch.autograd.grad(parts, [x["hidden"], x["weight"]]),
        torch.autograd.grad(whole, [x["hidden"], x["weight"]]),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-12)


def test_heads_and_ids_that_do_not_fit_are_refused() -> None:
    x = head((5, 4, 20, 2))
    h, w, ids = x["hidden"], x["weight"], x["ids"]
    with pytest.raises(ConfigError, match="does not fit the hidden states"):
        topk_logprobs(h, w[:, :3], ids)
    with pytest.raises(ConfigError, match="differ in dtype"):
        topk_logprobs(h.float(), w, ids)
    with pytest.raises(ConfigError, match="outside the student's vocabulary"):
        topk_logprobs(h, w, ids + 20)
    with pytest.raises(ConfigError, match="ids must be int64"):
        topk_logprobs(h, w, ids[:3])
    with pytest.raises(ConfigError, match="bias does not fit"):
        topk_logprobs(h, w, ids, bias=x["bias"][:3])
    with pytest.raises(ConfigError, match="cannot have a temperature"):
        fused_divergence_loss(h, w, rows_of(ids, 20), temperature=2.0)
    with pytest.raises(ConfigError, match="reduction mean"):
        fused_divergence_loss(h, w, rows_of(ids, 20), reduction="none")
