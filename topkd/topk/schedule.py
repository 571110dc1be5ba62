"""TAID's interpolation schedule: linear, and faster while the loss falls (arXiv:2501.16937)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from topkd.topk.errors import ConfigError
from topkd.topk.maths.scalars import check_integer, check_positive, check_real

_SMALLEST_LOSS = 1e-8  # a change relative to a loss of 0 would be about 1e15, and stay in the momentum

_LARGEST_CHANGE = 1e30


class TAIDScheduler:
    """Weight t that grows from t_start to t_end, each step by at least alpha * sigmoid(momentum) * (1 - t).

    After the first call, with float32 state: rel = (prev - loss) / prev; m = beta m + (1-beta) rel;
    delta = alpha sigmoid(m) (1 - t); target = t_start + (t_end - t_start) step / N;
    t = min(t_end, max(target, t + delta)). A falling loss makes rel positive, and t grow faster. With
    ``disable_adaptive`` t = target. Call ``update_t`` once per *optimiser* step; the last linear target is
    t_start + (t_end - t_start)(N - 1)/N. The paper's schedule (arXiv:2501.16937), except that a loss that is not finite
    is skipped, and a previous loss closer to 0 than 1e-8 counts as 1e-8.

    Attributes:
        t: The weight to use for the next step.
    """

    def __init__(
        self,
        num_train_steps: int,
        *,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        disable_adaptive: bool = False,
    ) -> None:
        t_start, t_end = check_real("t_start", t_start), check_real("t_end", t_end)
        alpha, beta = check_real("alpha", alpha), check_real("beta", beta)
        if not 0.0 <= t_start < t_end <= 1.0:
            raise ConfigError("TAID needs 0 <= t_start < t_end <= 1", got=f"t_start {t_start}, t_end {t_end}")
        if not 0.0 <= beta < 1.0:
            raise ConfigError("beta must lie in [0, 1)", got=beta)
        if not 0.0 <= alpha < math.inf:
            raise ConfigError("alpha must be finite and not negative", got=alpha)
        self.num_train_steps = check_positive("num_train_steps", num_train_steps)
        self.t_start, self.t_end = t_start, t_end
        self.alpha, self.beta = alpha, beta
        self.disable_adaptive = disable_adaptive
        self._t = np.float32(t_start)
        self._momentum = np.float32(0.0)
        self._prev_loss: np.float32 | None = None
        self._skipped = 0

    @property
    def t(self) -> float:
        """Interpolation weight of the teacher for the next step."""
        return float(self._t)

    @property
    def momentum(self) -> float:
        """Running mean of the relative decrease of the loss."""
        return float(self._momentum)

    @property
    def prev_loss(self) -> float | None:
        """The last finite loss, None before the first."""
        return None if self._prev_loss is None else float(self._prev_loss)

    @property
    def skipped(self) -> int:
        """Number of non-finite losses that were left out."""
        return self._skipped

    def update_t(self, loss: float, global_step: int) -> float | None:
        """Update t after an optimiser step; return the adaptive increment, or None if there is none yet.

        The first finite loss is only stored. A loss that is nan or infinite changes neither t nor the momentum.

        Args:
            loss: The step's loss (a float or a one-element tensor).
            global_step: Number of optimiser steps taken, 0-based.
        """
        step = check_real("global_step", global_step)
        if math.isnan(step):
            raise ConfigError("global_step must be a number", got=step)
        with np.errstate(over="ignore"):
            value = np.float32(check_real("loss", loss))
        if not math.isfinite(value):
            self._skipped += 1
            return None
        previous, self._prev_loss = self._prev_loss, value
        if previous is None:
            return None
        # in float64 and bounded: a float32 quotient can overflow, and the momentum would stay infinite
        change = (float(previous) - float(value)) / _away_from_zero(float(previous))
        relative = np.float32(min(max(change, -_LARGEST_CHANGE), _LARGEST_CHANGE))
        self._momentum = np.float32(self.beta) * self._momentum + np.float32(1.0 - self.beta) * relative
        delta = np.float32(self.alpha) * _sigmoid(self._momentum) * (np.float32(1.0) - self._t)
        progress = min(max(step, 0.0), self.num_train_steps) / self.num_train_steps
        target = np.float32(self.t_start + (self.t_end - self.t_start) * progress)
        moved = target if self.disable_adaptive else max(target, self._t + delta)
        self._t = min(np.float32(self.t_end), moved)
        return float(delta)

    def state_dict(self) -> dict[str, Any]:
        """Return the changing state as plain numbers."""
        return {"t": self.t, "momentum": self.momentum, "prev_loss": self.prev_loss, "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a ``state_dict()``; settings are not part of it."""
        if not isinstance(state, dict):
            raise ConfigError("TAIDScheduler state: not a state_dict()", got=type(state).__name__)
        missing = {"t", "momentum", "prev_loss"} - state.keys()
        if missing:
            raise ConfigError("TAIDScheduler state lacks keys", got=sorted(state), expected=sorted(missing))
        loaded = {key: check_real(f"TAIDScheduler state: {key}", state[key]) for key in ("t", "momentum")}
        previous = (
            None if state["prev_loss"] is None else check_real("TAIDScheduler state: prev_loss", state["prev_loss"])
        )
        skipped = check_integer("TAIDScheduler state: skipped", state.get("skipped", 0))
        if not 0.0 <= loaded["t"] <= 1.0 or not all(map(math.isfinite, (loaded["momentum"], previous or 0.0))):
            raise ConfigError("TAIDScheduler state out of range", got=state, expected="t in [0, 1], finite numbers")
        self._t, self._momentum = np.float32(loaded["t"]), np.float32(loaded["momentum"])
        self._prev_loss = None if previous is None else np.float32(previous)
        self._skipped = skipped


def _away_from_zero(loss: float) -> float:
    return loss if abs(loss) > _SMALLEST_LOSS else _SMALLEST_LOSS


def _sigmoid(x: np.float32) -> np.float32:
    # exp of a negative number cannot overflow
    grown = np.exp(-abs(x), dtype=np.float32)
    return np.float32((1.0 if x >= 0 else grown) / (np.float32(1.0) + grown))
