"""Inputs are read and never written, whatever their layout: read-only arrays, strided views, transposed tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.topk.every_loss import EVERY, pair
from tests.topk.lists import random_logp, topk_of
from topkd.topk import (
    TopK,
    compute_topk_gjs,
    discounted_return,
    extract_token_logprobs,
    forward_kl_advantage,
    gated_rows,
    gjs,
    gjs_advantage,
    kl_k1,
    kl_k3,
    scalar_kl_advantage,
    shared_support_gjs,
    slice_completion_topk,
    topk_weights,
    value_baseline,
)
from topkd.topk.losses import (
    fused_divergence_loss,
    fused_topk_policy_gradient_loss,
    icepop_loss,
    importance_sampling_loss,
    ppo_clip_loss,
    reinforce_loss,
    sparse_eopd_loss,
    sparse_taid_loss,
    topk_policy_gradient_loss,
)

LISTS = topk_of(random_logp(np.random.default_rng(0), 6, 12), 5, actual=np.array([0, 3, 5, 1, 11, 7]))
PAIRED: dict[str, Callable[[Any, Any], Any]] = {
    "scalar_kl_advantage": scalar_kl_advantage,
    "forward_kl_advantage": forward_kl_advantage,
    "gjs_advantage": lambda t, s: gjs_advantage(t, s, 0.3),
    "gjs": lambda t, s: gjs(t, s, 0.3),
    "shared_support_gjs": lambda t, s: shared_support_gjs(t[:, :4], s[:, :4], 0.3),
    "value_baseline": lambda t, s: value_baseline(t[:, :4], s[:, :4], 0.3),
    "kl_k1": kl_k1,
    "kl_k3": kl_k3,
    "discounted_return": lambda t, s: discounted_return(t[:, 0], -s[:, 0], 0.9, lengths=[2, 4]),
    "topk_weights": lambda t, s: np.hstack(
        [w.reshape(6, -1) for w in topk_weights(LISTS, s[:, :5], t[:, 0], beta=0.3, lam=1.0)]
    ),
    "gated_rows": lambda t, s: gated_rows(LISTS, s[:, :5]),
}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_numpy_reads_any_layout_and_writes_nothing(name: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    plain = [random_logp(rng, 6, 12).astype(dtype) for _ in range(2)]
    wanted = PAIRED[name](*(side.copy() for side in plain))
    strided = []
    for side in plain:
        base = np.full((12, 24), np.nan, dtype=dtype)
        base[::2, ::-2] = side
        base.flags.writeable = False
        strided.append(base[::2, ::-2])
        strided.append(np.asfortranarray(side))
    for got in (PAIRED[name](strided[0], strided[2]), PAIRED[name](strided[1], strided[3])):
        np.testing.assert_allclose(got, wanted, rtol=1e-6 if wanted.dtype == np.float32 else 1e-13)
        assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(strided[1], plain[0])
    np.testing.assert_array_equal(strided[3], plain[1])


def test_the_list_functions_leave_the_callers_lists_alone() -> None:
    teacher, student = [[(1, -1.0), (2, -0.7), (1, -2.0)], []], [[(2, -0.2)], [(3, -0.1)]]
    full = [None, *teacher]
    before = repr((teacher, student, full))
    compute_topk_gjs(teacher, student, 0.5)
    extract_token_logprobs(teacher, [1, 2])
    TopK.from_lists(teacher)
    kept = slice_completion_topk(full, 1, 2)
    kept[0].append((9, -9.0))
    assert repr((teacher, student, full)) == before


def scattered(x: Tensor) -> Tensor:
    """The same values, transposed in memory and between nan."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype) if x.is_floating_point() else None
    if wide is None:
        return x.t().contiguous().t() if x.dim() == 2 else x
    wide[..., ::2] = x
    return wide.transpose(0, -1).contiguous().transpose(0, -1)[..., ::2]


SPARSE: dict[str, Callable[..., Tensor]] = {
    "is": lambda h, w, z: importance_sampling_loss(z[:, 0], z[:, 1].detach(), z[:, 2], cap=2.0),
    "ppo": lambda h, w, z: ppo_clip_loss(z[:, 0], z[:, 1].detach(), z[:, 2], dual_clip=3.0),
    "icepop": lambda h, w, z: icepop_loss(z[:, 0], z[:, 1].detach(), z[:, 2]),
    "reinforce": lambda h, w, z: reinforce_loss(z[:, 0], z[:, 2]),
    "topk policy": lambda h, w, z: topk_policy_gradient_loss(z.log_softmax(-1)[:, :5], z.log_softmax(-1)[:, 6], LISTS),
    "sparse taid": lambda h, w, z: sparse_taid_loss(z, LISTS, t=0.4)[0],
    "sparse eopd": lambda h, w, z: sparse_eopd_loss(z, LISTS)[0],
    "fused bucket": lambda h, w, z: fused_divergence_loss(h, w, LISTS, chunk=2),
    "fused renormalised": lambda h, w, z: fused_divergence_loss(h, w, LISTS, tail="renormalise"),
    "fused policy": lambda h, w, z: fused_topk_policy_gradient_loss(h, w, LISTS, chunk=4).loss,
}


def check(call: Callable[..., Tensor], *inputs: Tensor) -> None:
    def run(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        loss = call(*tensors)
        return loss, list(torch.autograd.grad(loss, tensors, allow_unused=True))

    loss, grads = run([x.detach().clone().requires_grad_() for x in inputs])
    moved = [scattered(x.detach()) for x in inputs]
    assert not any(x.is_contiguous() for x in moved if x.dim() > 1)
    leaves = [x.requires_grad_() for x in moved]
    versions, values = [x._version for x in leaves], [x.detach().clone() for x in leaves]
    again, other = run(leaves)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    for a, b in zip(grads, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    assert [x._version for x in leaves] == versions
    assert all(torch.equal(x.detach(), value) for x, value in zip(leaves, values, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_dense_losses_read_any_layout_and_write_nothing(name: str) -> None:
    student, teacher = pair(3, (2, 3, 7))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    check(lambda s: EVERY[name](s, scattered(teacher), mask), student)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_and_fused_losses_read_any_layout_and_write_nothing(name: str) -> None:
    g = torch.Generator().manual_seed(4)
    hidden, weight, logits = (torch.randn(*shape, generator=g).double() for shape in ((6, 8), (12, 8), (6, 12)))
    check(SPARSE[name], hidden, weight, logits)
