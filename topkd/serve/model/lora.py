"""LoRA adapters on the served model, loaded by transformers and verified against the files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topkd.serve.log_setup import silence_loading
from topkd.topk.errors import ConfigError

_PREFIX = "base_model.model."


def load(model: Any, name: str, path: str) -> None:
    """Load the folder at ``path`` as adapter ``name`` and make it active.

    Raises:
        ConfigError: The model's tensors are not the folder's afterwards, or another adapter's have changed.
    """
    others = {key: value.clone() for key, value in _tensors(model).items()}
    with silence_loading(), warnings.catch_warnings():  # several adapters side by side are what a server is for
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        model.load_adapter(path, adapter_name=_key(name))
    model.eval()
    _verify(model, _key(name), path, others)


def unload(model: Any, name: str) -> None:
    """Remove an adapter, if it is there."""
    if _key(name) in getattr(model, "peft_config", {}):
        model.delete_adapter(_key(name))


def switch(model: Any, name: str | None) -> None:
    """Make a loaded adapter active, or none."""
    if name is not None:
        model.enable_adapters()
        model.set_adapter(_key(name))
    elif getattr(model, "peft_config", {}):
        model.disable_adapters()


def _key(name: str) -> str:
    """Return the name as peft takes it: module names hold no dot, and "Qwen2.5@7" is a valid adapter name."""
    return "adapter_" + name.encode().hex()


def _tensors(model: Any) -> dict[str, Tensor]:
    return {key: value for key, value in model.named_parameters() if ".lora_" in key}


def _verify(model: Any, name: str, path: str, others: dict[str, Tensor]) -> None:
    # A loader that skips what it does not recognise leaves random or zero factors: numbers that look like an adapter's.
    from safetensors.torch import load_file

    now = _tensors(model)
    changed = [key for key, value in others.items() if key not in now or not torch.equal(now[key], value)]
    if changed:
        raise ConfigError("loading one adapter changed another", where=changed[0])
    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        raise ConfigError("the adapter has no adapter_model.safetensors", where=path)
    sent = load_file(file)
    mine = {key.replace(f".{name}.", "."): value for key, value in now.items() if key not in others}
    for key, value in sent.items():
        if ".lora_" not in key:
            continue
        got = mine.pop(key.removeprefix(_PREFIX), None)
        if got is None or not torch.equal(got.cpu(), value.to(got.dtype)):
            raise ConfigError("the adapter does not fit the model", where=f"{path}: {key}")
    if mine:
        raise ConfigError("the adapter lacks factors its config names", where=f"{path}: {min(mine)}")
