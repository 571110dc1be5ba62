"""Models from disk, and new weights brought into a model that is being served."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from topkd.serve.config import ServeConfig
from topkd.topk.errors import ConfigError


def pick_device(wanted: str) -> torch.device:
    """``auto`` is cuda, then mps, then cpu."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "the device cannot be used",
            where=f"device={wanted}",
            got=str(error).splitlines()[0],
            expected="auto, cpu, cuda or mps",
        ) from error
    return device


def load_model(config: ServeConfig) -> tuple[Any, Any]:
    """The model of ``config`` in evaluation mode on its device, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = pick_device(config.device)
    dtype: Any = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        with _without_bars():
            tokenizer = AutoTokenizer.from_pretrained(config.model)
            model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "the model cannot be loaded",
            where=f"model={config.model}",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint="give a folder with config.json, weights and tokenizer, or the id of a causal LM in the local cache",
        ) from error
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def reload_weights(model: Any, path: str) -> None:
    """Copy the checkpoint at ``path`` into ``model`` in place; all of it, or an error and not one weight changed.

    Raises:
        ConfigError: No such folder, an unreadable checkpoint, or names and shapes that are not the model's.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            "no checkpoint folder", where=f"weights_path={path}", hint="give a folder this server can read"
        )
    try:
        with _without_bars():
            fresh = AutoModelForCausalLM.from_pretrained(
                folder, dtype=next(model.parameters()).dtype, local_files_only=True
            )
    except Exception as error:
        raise ConfigError(
            "the checkpoint cannot be read", where=f"weights_path={path}", got=repr(error)[:300]
        ) from error
    new = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    # Layers wrapped by an adapter keep their own weight under ``base_layer``.
    old = {name.replace(".base_layer.", "."): tensor for name, tensor in _weights(model).items()}
    wrong = sorted(new.keys() ^ old.keys()) or [name for name in old if old[name].shape != new[name].shape]
    if wrong:
        name = wrong[0]
        got, expected = (tuple(t[name].shape) if name in t else "absent" for t in (new, old))
        raise ConfigError(
            f"the checkpoint is of another architecture: {name}",
            where=f"weights_path={path}",
            got=got,
            expected=expected,
        )
    for name, tensor in old.items():
        tensor.copy_(new[name])


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """A server's standard error is a log: no progress bars in it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _weights(model: Any) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in named.items() if ".lora_" not in name}
