"""The gradient noise of a step, from the norms that gradient accumulation shows anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class GradientNoise:
    """How noisy a step's gradient is, from its norm after half of the micro-batches and after all of them.

    With n and N tokens and mean gradients g and G: |grad|^2 = (N |G|^2 - n |g|^2) / (N - n) and the noise of one token
    tr = (|g|^2 - |G|^2) / (1/n - 1/N), both unbiased for tokens drawn alike (arXiv:1812.06162). Their ratio is the
    batch size, in tokens, at which noise and signal are equal: average both over steps before dividing.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._tokens = 0
        self._square = 0.0

    def small(self, parameters: Sequence[Tensor], tokens: int) -> None:
        """Look at the gradients after ``tokens`` tokens."""
        norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
        if tokens and norms:
            self._tokens = tokens
            self._square = float(torch.stack(norms).square().sum()) * (self.num_tokens / tokens) ** 2

    def metrics(self, norm: float) -> dict[str, float]:
        """``grad_noise`` (tokens), and the two parts that are worth averaging; nothing without two micro-batches."""
        n, total = self._tokens, self.num_tokens
        if not 0 < n < total or not math.isfinite(norm):
            return {}
        signal = (total * norm**2 - n * self._square) / (total - n)
        trace = (self._square - norm**2) / (1 / n - 1 / total)
        ratio = trace / signal if signal > 0 and trace >= 0 else math.nan
        return {"grad_noise": ratio, "grad_noise_trace": trace, "grad_signal": signal}
