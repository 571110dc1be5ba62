"""The fused head holds no N x V of anything, and computes nothing that nobody needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.topk.heads import Largest, head, rows_of
from topkd.topk.errors import ConfigError
from topkd.topk.fused import topk_logprobs
from topkd.topk.losses import (
    fused_divergence_loss,
    sparse_divergence_loss,
)


@pytest.mark.parametrize("route", ["row_loss", "logprobs", "subset"])
def test_no_tensor_of_n_times_v_is_ever_made(route: str) -> None:
    n, h, v, k = 64, 4, 1000, 3
    x = head((n, h, v, k), torch.float32)
    rows = rows_of(x["ids"], v)
    with Largest() as seen:
        if route == "logprobs":
            logp, _ = topk_logprobs(x["hidden"], x["weight"], x["ids"], chunk=100)
            torch.where(x["ids"] >= 0, logp, 0.0).sum().backward()
        elif route == "subset":
            fused_divergence_loss(x["hidden"], x["weight"], rows, tail="renormalise").backward()
        else:
            fused_divergence_loss(x["hidden"], x["weight"], rows, chunk=8).backward()
    assert seen.numel <= max(8 * v, n * 100, v * h)
    with Largest() as dense:
        sparse_divergence_loss(x["hidden"] @ x["weight"].t(), rows).backward()
    assert dense.numel == n * v  # the probe sees it when it happens


@pytest.mark.parametrize("route", ["row_loss", "logprobs"])
def test_a_frozen_head_gets_no_gradient_and_none_is_computed(route: str) -> None:
    x = head((16, 5, 300, 3), torch.float32)

    def step(weight: Tensor) -> set[tuple[int, ...]]:
        with Largest() as seen:
            if route == "logprobs":
                logp, _ = topk_logprobs(x["hidden"], weight, x["ids"], chunk=30)
                torch.where(x["ids"] >= 0, logp, 0.0).sum().backward()
            else:
                fused_divergence_loss(x["hidden"], weight, rows_of(x["ids"], 300), chunk=4).backward()
        return seen.shapes

    frozen = x["weight"].detach()
    assert (300, 5) not in step(frozen)
    assert frozen.grad is None
    assert x["hidden"].grad.abs().sum() > 0
    assert (300, 5) in step(x["weight"])  # the probe sees dW when it is made


def test_a_tied_head_collects_both_gradients() -> None:
    torch.manual_seed(0)
    table = torch.randn(29, 6, dtype=torch.float64, requires_grad=True)
    tokens, ids = torch.randint(0, 29, (12,)), torch.rand(12, 29).topk(3).indices
    rows = rows_of(ids, 29)
    wanted = sparse_divergence_loss(table[tokens].tanh() @ table.t(), rows)
    ours = fused_divergence_loss(table[tokens].tanh(), table, rows, chunk=5)
    torch.testing.assert_close(*[torch.autograd.grad(loss, table)[0] for loss in (ours, wanted)])


def test_masked_rows_and_holes_never_meet_the_head_and_may_hold_nan() -> None:
    x = head((10, 4, 50, 3))
    rows = rows_of(x["ids"].clamp(min=0), 50)
    rows.ids[9], rows.logp[9] = -1, -math.inf
    hidden = x["hidden"].detach().clone()
    hidden[[0, 5, 9]] = math.nan
    hidden.requires_grad_()
    mask = torch.ones(10, dtype=torch.bool)
    mask[[0, 5]] = False
    with Largest() as seen:
        loss = fused_divergence_loss(hidden, x["weight"], rows, mask)
        loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(hidden.grad).all()
    assert not hidden.grad[[0, 5, 9]].any()
    assert (7, 50) in seen.shapes
    assert (10, 50) not in seen.shapes


def test_without_gradients_the_value_is_the_same_and_no_gradient_is_computed() -> None:
    x = head((12, 8, 90, 3))
    rows = rows_of(x["ids"], 90)
    wanted = fused_divergence_loss(x["hidden"], x["weight"], rows)
    with torch.no_grad(), Largest() as seen:
        value = fused_divergence_loss(x["hidden"], x["weight"], rows)
    assert value.item() == wanted.item()
    assert not value.requires_grad
    assert (90, 8) not in seen.shapes


def test_a_second_backward_is_refused_instead_of_scaling_twice() -> None:
    x = head((5, 4, 20, 2))
    loss = fused_divergence_loss(x["hidden"], x["weight"], rows_of(x["ids"], 20))
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="backward twice"):
        loss.backward()


# dynamo itself looks at .grad of the intermediate it resumes with
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_training_step_gives_the_eager_gradients() -> None:
    x = head((12, 8, 90, 3))
    rows = rows_of(x["ids"], 90)
    layer = torch.randn(8, 8, dtype=torch.float64)

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return 2.0 * fused_divergence_loss((hidden @ layer).tanh(), weight, rows, chunk=5)

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        logp, lse = topk_logprobs((hidden @ layer).tanh(), weight, x["ids"], chunk=40)
        return torch.where(x["ids"] >= 0, logp, 0.0).sum() + lse.sum()

    for step in (fused, logprobs):
        wanted = torch.autograd.grad(step(x["hidden"], x["weight"]), [x["hidden"], x["weight"]])
        torch._dynamo.reset()
        compiled = torch.compile(step, backend="aot_eager")
        got = torch.autograd.grad(compiled(x["hidden"], x["weight"]), [x["hidden"], x["weight"]])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
