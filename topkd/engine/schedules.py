"""The learning rate of a step: warm-up, then constant, linear or cosine. No state: the step's number says it all."""

from __future__ import annotations

import math

from topkd.engine.learner_config import LearnerConfig
from topkd.topk.errors import ConfigError


def check_schedule(config: LearnerConfig, steps: int | None) -> None:
    """Refuses a falling rate without an end, and a warm-up longer than the run."""
    if config.schedule != "constant" and steps is None:
        raise ConfigError(f"learner.schedule {config.schedule!r} falls towards the last step", hint="give the steps")
    if steps is not None and config.schedule != "constant" and config.warmup_steps >= steps:
        raise ConfigError(
            "learner.warmup_steps leaves nothing of the run to fall in",
            got=config.warmup_steps,
            expected=f"below steps = {steps}",
        )


def rate_factor(config: LearnerConfig, step: int, steps: int | None) -> float:
    """What the peak rate is multiplied by at 0-based ``step``, in (0, 1].

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
