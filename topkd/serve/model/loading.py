"""Loading of models, and reloading of weights while a model is served."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from topkd.serve.config import ServeConfig
from topkd.topk.errors import ConfigError


@contextlib.contextmanager
def silence_loading() -> Iterator[None]:
    """Switch off transformers' progress bars and loading reports."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def choose_device(wanted: str) -> torch.device:
    """Choose the device; ``auto`` is cuda, then mps, then cpu."""
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
    """Load the model in evaluation mode on its device, and its tokenizer."""
    device = choose_device(config.device)
    dtype: Any = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    # A folder may hold anything, and every library that reads it fails in its own way: hence the bare Exceptions.
    with silence_loading():
        try:
            tokenizer = _tokenizer(config.model)
        except Exception as error:
            raise _cannot_load("the tokenizer", config, error) from error
        try:
            return _load_complete(config.model, dtype).to(device).eval(), tokenizer
        except Exception as error:
            raise _cannot_load("the model", config, error) from error


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without one
        raise ConfigError("no token but special ones")
    return tokenizer


def _load_complete(path: str | Path, dtype: Any) -> Any:
    """Load the causal LM at ``path``; refuse one with missing or mismatched weights.

    transformers goes on with random numbers where weights are missing: a teacher of noise that looks like any other.
    """
    from transformers import AutoModelForCausalLM

    model, account = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if missing := sorted(account["missing_keys"]):
        raise ConfigError(f"no weights for {missing[0]} ({len(missing)} in all)")
    if mismatched := sorted(account["mismatched_keys"]):
        name, held, wanted = mismatched[0]
        raise ConfigError(f"{name} of shape {tuple(held)} where config.json says {tuple(wanted)}")
    return model


def _cannot_load(what: str, config: ServeConfig, error: Exception) -> ConfigError:
    where = f"model={config.model}"
    if isinstance(error, OSError) and not Path(config.model).is_dir():
        hint = f"no such folder, nor such an id in the local Hugging Face cache (hf download {config.model})"
        return ConfigError("the model cannot be loaded", where=where, hint=hint)
    got = _first_line(error)
    return ConfigError(
        f"{what} cannot be loaded", where=where, got=got, hint="give a folder with config.json, weights and tokenizer"
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300].rstrip(':. ')}" if lines else type(error).__name__


@torch.no_grad()
def reload_weights(model: Any, path: str) -> None:
    """Copy the checkpoint at ``path`` into ``model`` in place; all of it, or an error and not one weight changed.

    Raises:
        ConfigError: No such folder, an unreadable checkpoint, or names and shapes that are not the model's.
    """
    folder, where = Path(path), f"weights_path={path}"
    if not folder.is_dir():
        raise ConfigError("no checkpoint folder", where=where, hint="give a folder that this server can read")
    try:
        with silence_loading():
            fresh = _load_complete(folder, next(model.parameters()).dtype)
    except Exception as error:
        raise ConfigError("the checkpoint cannot be read", where=where, got=_first_line(error)) from error
    new = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    # Layers wrapped by an adapter keep their own weight under ``base_layer``.
    old = {name.replace(".base_layer.", "."): tensor for name, tensor in _weights(model).items()}
    wrong = sorted(new.keys() ^ old.keys()) or [name for name in old if old[name].shape != new[name].shape]
    if wrong:
        name = wrong[0]
        got, expected = (tuple(t[name].shape) if name in t else "absent" for t in (new, old))
        what = f"the checkpoint is of another architecture: {name}"
        raise ConfigError(what, where=where, got=got, expected=expected)
    for name, tensor in old.items():
        tensor.copy_(new[name])


def _weights(model: Any) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in named.items() if ".lora_" not in name}
