"""AdamW with 32-bit or 8-bit state; its state is saved and loaded by parameter name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from topkd.engine.config.learner import LearnerConfig
from topkd.topk.errors import ConfigError


def build_optimizer(config: LearnerConfig, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """Build the configured optimiser; refuse one that this machine cannot run."""
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


def collect_optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy all state tensors by "parameter name/entry"; sharded ones are gathered (every rank must call it)."""
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
    """Load the tensors of ``collect_optimizer_tensors``; refuse the state of another student."""
    fresh: dict[str, dict[str, Any]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = named.get(name)
        if parameter is None or (key.startswith("exp_avg") and value.shape != parameter.shape):
            expected = "no such parameter" if parameter is None else tuple(parameter.shape)
            raise ConfigError(
                "the optimiser state belongs to another student", where=name, got=tuple(value.shape), expected=expected
            )
        fresh.setdefault(name, {})[key] = _place_tensor(value, parameter)
    optimizer.state.clear()
    for name, entries in fresh.items():
        optimizer.state[named[name]] = entries


def _place_tensor(value: Tensor, parameter: Tensor) -> Tensor:
    if not value.dim():  # a step counter stays where the optimiser keeps it
        return value.clone()
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, copy=True)


def check_schedule(config: LearnerConfig, steps: int | None) -> None:
    """Refuse a decaying rate without a number of steps, and a warm-up not shorter than the run."""
    if config.schedule == "constant":
        return
    if steps is None:
        what = f"learner.schedule {config.schedule!r} needs the number of steps"
        raise ConfigError(what, hint="pass steps= to the learner")
    if config.warmup_steps >= steps:
        what, got = "learner.warmup_steps must be shorter than the run", config.warmup_steps
        raise ConfigError(what, got=got, expected=f"below steps = {steps}")


def compute_rate_factor(config: LearnerConfig, step: int, steps: int | None) -> float:
    """Compute the factor of the peak rate at 0-based ``step``, in (0, 1].

    Warm-up: (step + 1) / warmup_steps. Then, with p from 0 at the first step after it to 1 at the step after the last,
    linear 1 - (1 - f) p, cosine f + (1 - f) (1 + cos(pi p)) / 2, f = ``final_lr_fraction``.
    """
    warm = config.warmup_steps
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant" or steps is None:
        return 1.0
    final = config.final_lr_fraction
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    falling = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return final + (1.0 - final) * falling
