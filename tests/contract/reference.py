"""What the servers should have said: a float64 forward pass over the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from tests.contract.adapters import merge_adapter

Float64 = NDArray[np.float64]


@lru_cache(maxsize=8)
def _model(folder: Path, adapter: Path | None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    if adapter is not None:
        merge_adapter(model, adapter)
    return model.eval()


@torch.inference_mode()
def logp_rows(folder: Path, ids: Sequence[int], *, adapter: Path | None = None) -> Float64:
    """float64 [T, V]: row t is the log-distribution of the token after ``ids[: t + 1]``."""
    logits = _model(Path(folder), adapter)(torch.tensor([list(ids)])).logits[0]
    return np.asarray(torch.log_softmax(logits.double(), dim=-1).numpy())


def ranks(row: Float64) -> NDArray[np.int64]:
    """int [V]: the 1-based rank of each id, as vLLM counts it (ties share no test: the weights are random)."""
    order = np.argsort(-row, kind="stable")
    out = np.empty(row.size, dtype=np.int64)
    out[order] = np.arange(1, row.size + 1)
    return out
