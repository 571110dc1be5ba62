"""How much a bulk job may still send and spend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cap:
    """An upper limit on what a job uses.

    Attributes:
        name: As a report states it.
        amount: The limit.
        prompt_price: What a prompt token counts.
        completion_price: What a sampled token counts.
    """

    name: str
    amount: float
    prompt_price: float = 1
    completion_price: float = 1


class SpendingLimit:
    """What a job may still use under all of its caps.

    Tokens are taken before a request is sent. They stay taken when it fails, because it may have been billed.
    """

    def __init__(self, caps: Iterable[Cap]) -> None:
        self._caps = tuple(caps)
        self._prompt_tokens = self._completion_tokens = 0
        self.reached = ""  # name of the cap that refused the last tokens

    def take(self, prompt_tokens: int, completion_tokens: int = 0) -> bool:
        """Take tokens; return False, and take none, when they do not fit."""
        prompt, completion = self._prompt_tokens + prompt_tokens, self._completion_tokens + completion_tokens
        for cap in self._caps:
            if prompt * cap.prompt_price + completion * cap.completion_price > cap.amount:
                self.reached = cap.name
                return False
        self._prompt_tokens, self._completion_tokens = prompt, completion
        return True

    def give_back(self, completion_tokens: int) -> None:
        """Return sampled tokens that were taken and not used."""
        self._completion_tokens -= completion_tokens
