"""AdamW, in 32 or in 8 bits, and the state a checkpoint keeps of it, by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from topkd.engine.learner_config import LearnerConfig
from topkd.topk.errors import ConfigError


def build_optimizer(config: LearnerConfig, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """The configured optimiser; one that this machine cannot run is refused, never replaced."""
    chosen = list(parameters)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(chosen, lr=lr, betas=config.betas, weight_decay=config.weight_decay)
    try:
        import bitsandbytes  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            'learner.optimizer = "adamw_8bit" needs bitsandbytes',
            hint='pip install bitsandbytes, or leave it at "adamw"',
        ) from error
    if any(isinstance(parameter, DTensor) for parameter in chosen):
        raise ConfigError("8-bit Adam does not work on sharded weights", hint='use "adamw" with strategy "fsdp2"')
    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        chosen, lr=lr, betas=config.betas, weight_decay=config.weight_decay
    )
    return made


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all state tensors by "parameter name/entry"; sharded ones are gathered whole (every rank must call)."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                tensors[f"{name}/{key}"] = whole.detach().clone()
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what ``optimizer_tensors`` gave; state of another student is refused."""
    fresh: dict[str, dict[str, Any]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = named.get(name)
        if parameter is None or (key.startswith("exp_avg") and value.shape != parameter.shape):
            expected = "no such parameter" if parameter is None else tuple(parameter.shape)
            raise ConfigError(
                "optimiser state of another student", where=name, got=tuple(value.shape), expected=expected
            )
        fresh.setdefault(name, {})[key] = _placed(value, parameter)
    optimizer.state.clear()
    for name, entries in fresh.items():
        optimizer.state[named[name]] = entries


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    if not value.dim():  # a step counter stays where the optimiser keeps it
        return value.clone()
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, copy=True)
