"""The fused head: the same numbers and gradients as dense logits, without ever holding N x V of anything."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from topkd.topk.errors import ConfigError
from topkd.topk.fused import fused_row_loss, gather_logprobs, subset_logits, topk_logprobs
from topkd.topk.losses import (
    SparseTeacher,
    fused_divergence_loss,
    fused_topk_policy_gradient_loss,
    sparse_divergence_loss,
    topk_policy_gradient_loss,
)

SHAPES = [(1, 3, 2, 1), (7, 5, 33, 4), (37, 16, 211, 5), (64, 8, 127, 127)]  # N, H, V, K


def head(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    n, h, v, k = shape
    g = torch.Generator().manual_seed(seed)

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    ids = torch.rand(n, v, generator=g).topk(k).indices
    if k > 1:
        ids[0, -1] = -1
    return {"hidden": leaf(n, h), "weight": leaf(v, h), "bias": leaf(v), "ids": ids}


def rows_of(ids: Tensor, vocab: int, seed: int = 1) -> SparseTeacher:
    g = torch.Generator().manual_seed(seed)
    n, k = ids.shape
    full = torch.log_softmax(2 * torch.randn(n, k + 1, generator=g, dtype=torch.float64), -1)
    logp = full[:, :-1].sort(-1, descending=True).values.masked_fill(ids < 0, -math.inf)
    tail = torch.log1p(-logp.exp().sum(-1).clamp(max=1 - 1e-7))
    y = torch.randint(0, vocab, (n,), generator=g)
    return SparseTeacher(ids, logp, tail, y, -3.0 * torch.rand(n, generator=g, dtype=torch.float64))


def mixed(logp: Tensor, ids: Tensor, lse: Tensor) -> Tensor:
    """A loss that weighs every entry and the logsumexp differently."""
    weights = torch.linspace(-1, 2, ids.numel(), dtype=logp.dtype).reshape(ids.shape)
    slopes = torch.linspace(0.5, -1, lse.numel(), dtype=lse.dtype)
    return (weights * torch.where(ids >= 0, logp, 0.0).exp()).sum() + (slopes * lse).sum()


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"], inputs["bias"]]))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, and the rows that met the head."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.shapes = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor):
                self.numel = max(self.numel, made.numel())
                self.shapes.add(tuple(made.shape))
        return out


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
    at_ids = logp.gather(-1, rows.safe_ids)
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
    weight = x["weight"].detach()
    with Largest() as seen:
        if route == "logprobs":
            logp, _ = topk_logprobs(x["hidden"], weight, x["ids"], chunk=30)
            torch.where(x["ids"] >= 0, logp, 0.0).sum().backward()
        else:
            fused_divergence_loss(x["hidden"], weight, rows_of(x["ids"], 300), chunk=4).backward()
    assert weight.grad is None
    assert x["hidden"].grad.abs().sum() > 0
    assert (300, 5) not in {s for s in seen.shapes if s == (300, 5)} or route == "row_loss"


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


def test_bf16_gradients_are_as_close_to_float64_as_the_dense_ones() -> None:
    x = head((64, 32, 2000, 8), torch.bfloat16)
    rows = rows_of(x["ids"], 2000)
    wide = {name: t.detach().double().requires_grad_() for name, t in x.items() if name != "ids"}
    exact_loss = sparse_divergence_loss(wide["hidden"] @ wide["weight"].t(), rows)
    exact = torch.autograd.grad(exact_loss, [wide["hidden"], wide["weight"]])
    dense = sparse_divergence_loss((x["hidden"] @ x["weight"].t()).float(), rows)
    ours = fused_divergence_loss(x["hidden"], x["weight"], rows, chunk=16)
    assert ours.item() == pytest.approx(exact_loss.item(), rel=2e-3)
    wants = [x["hidden"], x["weight"]]
    for got, plain, true in zip(
        torch.autograd.grad(ours, wants), torch.autograd.grad(dense, wants), exact, strict=True
    ):
        assert got.dtype == torch.bfloat16
        assert (got.double() - true).norm() <= 1.5 * (plain.double() - true).norm() + 1e-3 * true.norm()
    logp, _ = topk_logprobs(*wants, x["ids"], chunk=300)
    assert logp.dtype == torch.float32


def test_float32_stays_within_float32_of_float64() -> None:
    x = head((40, 16, 500, 6), torch.float32)
    rows = rows_of(x["ids"], 500)
    exact = sparse_divergence_loss(x["hidden"].detach().double() @ x["weight"].detach().double().t(), rows)
    assert fused_divergence_loss(x["hidden"], x["weight"], rows).item() == pytest.approx(exact.item(), rel=2e-5)


def test_autocast_casts_as_a_linear_layer_would_and_gradients_keep_the_parameters_dtype() -> None:
    x = head((12, 8, 90, 3), torch.float32)
    rows = rows_of(x["ids"], 90)
    with torch.autocast("cpu", torch.bfloat16):
        ours = fused_divergence_loss(x["hidden"], x["weight"], rows, chunk=5)
        logp, _ = topk_logprobs(x["hidden"], x["weight"], x["ids"])
        dense = sparse_divergence_loss(torch.nn.functional.linear(x["hidden"], x["weight"]), rows)
    assert ours.item() == pytest.approx(dense.item(), rel=1e-2)
    assert logp.dtype == torch.float32
    gradient = torch.autograd.grad(ours, x["weight"])[0]
    assert gradient.dtype == torch.float32
    assert (gradient - torch.autograd.grad(dense, x["weight"])[0]).norm() < 0.02 * gradient.norm()


def test_without_gradients_the_value_is_the_same_and_no_gradient_is_computed() -> None:
    x = head((12, 8, 90, 3))
    rows = rows_of(x["ids"], 90)
    wanted = fused_divergence_loss(x["hidden"], x["weight"], rows)
    with torch.no_grad(), Largest() as seen:
        value = fused_divergence_loss(x["hidden"], x["weight"], rows)
    assert value.item() == wanted.item()
    assert not value.requires_grad
    assert (90, 8) not in seen.shapes


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


def test_a_second_backward_is_refused_instead_of_scaling_twice() -> None:
    x = head((5, 4, 20, 2))
    loss = fused_divergence_loss(x["hidden"], x["weight"], rows_of(x["ids"], 20))
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="backward twice"):
        loss.backward()


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
    with pytest.raises(ConfigError, match="cannot be tempered"):
        fused_divergence_loss(h, w, rows_of(ids, 20), temperature=2.0)
    with pytest.raises(ConfigError, match="reduction mean"):
        fused_divergence_loss(h, w, rows_of(ids, 20), reduction="none")
