"""LoRA with peft: add adapters to a model, read an adapted output head, merge adapters into the weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from topkd.engine.config.learner import LoRAConfig
from topkd.topk.errors import ConfigError


def with_adapter(model: Any, config: LoRAConfig, seed: int = 0) -> Any:
    """Wrap a model with a new peft adapter: only the adapter (and ``modules_to_save``) trains.

    A new adapter does not change the model's output; the same seed gives the same adapter.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("[student.lora] needs peft", hint="pip install 'topkd[train]'") from error
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    heads = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    named = set(config.modules_to_save) | (
        set() if isinstance(config.target_modules, str) else set(config.target_modules)
    )
    if tied and heads & named:
        raise ConfigError(
            "[student.lora] names the output head, which this model ties to its embedding",
            got=sorted(heads & named),
            hint="leave it out: an adapter on one of the two would untie them",
        )
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules),
        modules_to_save=list(config.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft uses a deprecated name of transformers 5; a user can do nothing about it
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError("[student.lora] does not fit this model", got=str(error).splitlines()[0][:200]) from error


def has_adapter(model: Any) -> bool:
    """Tell whether a model is a peft model, with an adapter that trains."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def unwrap_adapter(model: Any) -> Any:
    """Return the causal LM inside a peft model (the adapter's layers stay in it), or the model itself."""
    return model.get_base_model() if has_adapter(model) else model


def merge_adapter(model: Any) -> Any:
    """Copy the model, and merge the adapter into the copy's weights: an ordinary Hugging Face model."""
    return copy.deepcopy(model).merge_and_unload() if has_adapter(model) else model


def head_weights(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return an output head's weight [V, H] and bias [V] or None, differentiable, adapters included."""
    head, inner, weight = _find_weight(head)
    if inner is not head:  # W + scaling B A; peft computes it without detaching it
        weight = weight + head.get_delta_weight(_active(head)).to(weight.dtype)  # type: ignore[operator]
    bias = getattr(inner, "bias", None)
    return weight, bias if isinstance(bias, Tensor) else None


def head_rows(head: nn.Module) -> int:
    """Return the number of rows of the output head, V, without computing an adapted head's weights."""
    return int(_find_weight(head)[2].shape[0])


def _find_weight(head: nn.Module) -> tuple[nn.Module, nn.Module, Tensor]:
    """Find the head in use, the layer below its adapter (or itself), and that layer's weight."""
    saved = getattr(head, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):  # the head is trained in full: use the copy that is active
        head = saved[_active(head)]
    base = getattr(head, "base_layer", None)
    inner = base if isinstance(base, nn.Module) else head
    if not isinstance(inner.weight, Tensor):
        raise ConfigError("the student's output head has no weight matrix", got=type(head).__name__)
    return head, inner, inner.weight


def _active(head: nn.Module) -> str:
    active = head.active_adapters
    return str(active[0]) if isinstance(active, list | tuple) else str(active)
