"""Tensors, and the state of the process's random numbers, as safetensors files."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any device and layout."""
    from safetensors.torch import save_file

    own: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share storage (views, tied weights); a copy has its own.
        shared = plain.untyped_storage().nbytes() != plain.nbytes or plain.untyped_storage().data_ptr() in places
        own[name] = plain.clone() if shared else plain
        places.add(own[name].untyped_storage().data_ptr())
    save_file(own, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read them, on the CPU."""
    from safetensors.torch import load_file

    return dict(load_file(path))


def collect_random_state() -> dict[str, Tensor]:
    """Where the generators of torch (CPU and CUDA), NumPy and Python stand."""
    version, words, gauss = random.getstate()
    _, keys, place, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - what libraries draw from
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss], dtype=torch.int64),  # type: ignore[union-attr]
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    for number, cuda in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []):
        state[f"cuda{number}"] = cuda
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Go on from there; a device that is not there any more is left out."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, place, has_gauss = state["numpy"].tolist()
    cached = float(state["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, cached))  # noqa: NPY002
    if torch.cuda.is_available():
        there = [state[f"cuda{number}"] for number in range(torch.cuda.device_count()) if f"cuda{number}" in state]
        for number, cuda in enumerate(there):
            torch.cuda.set_rng_state(cuda, number)
