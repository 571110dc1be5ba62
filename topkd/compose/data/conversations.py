"""Conversations of several turns, built by appending ids: no answer is rendered and tokenized again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from topkd.compose.data.chat_templates import Message, Side
from topkd.topk.errors import DataError
from topkd.topk.types import Bool, Int32


class Conversation:
    """The ids of a conversation as the model saw them, and which of them the assistant wrote.

    Rendering a history anew is what goes wrong in several turns: templates drop thinking from earlier answers, and a
    decoded answer need not give its own tokens back. Here the template writes only what stands between two answers.

    Args:
        side: Whose template.
        messages: Everything before the first answer.
        where: For error messages.
    """

    def __init__(self, side: Side, messages: Sequence[Message], where: str = "conversation") -> None:
        if not messages:
            raise DataError("a conversation needs a message before the first answer", where=where)
        self._side, self._where = side, where
        self._messages: list[Message] = list(messages)
        self._ids = side.chat(messages, where)
        self.prompt_len = len(self._ids)
        self._mask = [False] * self.prompt_len

    @property
    def ids(self) -> Int32:
        """Return int32 [T], everything so far; the next answer follows, unless the last message was one."""
        return np.array(self._ids, dtype=np.int32)

    @property
    def mask(self) -> Bool:
        """Return bool [T], True where the assistant spoke: what a student is trained on."""
        return np.array(self._mask, dtype=np.bool_)

    def answer(self, content: str, ids: Sequence[int] | None = None) -> None:
        """Append an answer: ``ids`` exactly as they were sampled, or those of ``content`` and the template's end."""
        if ids is None:
            end = self._end()
            ids = [*self._side.text(content, self._where, special=False), *end]
        if len(ids) == 0:
            raise DataError("an answer needs at least one token", where=self._where)
        self._ids += [int(token) for token in ids]
        self._mask += [True] * len(ids)
        self._last = content

    def say(self, messages: Sequence[Message]) -> None:
        """Append what is said to the assistant after an answer, up to where it speaks again; none of it trains."""
        behind = self._side.behind_answer(self._messages, messages, self._where)
        ids = self._side.text(behind, self._where, special=False)
        if ids and self._mask[-1]:  # the end of the answer stands there already, as far as it was sampled
            end = self._end()
            have = next((n for n in range(len(end), 0, -1) if self._ids[-n:] == end[:n]), 0)
            ids = ids[have:]
        self._ids += ids
        self._mask += [False] * len(ids)
        self._messages += [{"role": "assistant", "content": self._last}, *messages]

    def _end(self) -> list[int]:
        """Return the tokens that end an answer: up to the template's end token, not the line break behind it."""
        behind = self._side.behind_answer(self._messages, [], self._where)
        ids = self._side.text(behind, self._where, special=False)
        special = self._side.special_ids()
        ends = [place for place, token in enumerate(ids) if token in special]
        return ids[: ends[0] + 1] if ends else []


def read_conversation(side: Side, messages: Sequence[Message], first: int, where: str) -> Conversation:
    """Read a finished conversation: ``messages[first]`` is the first answer; it and all later answers train."""
    conversation = Conversation(side, messages[:first], where)
    place = first
    while place < len(messages):
        conversation.answer(str(messages[place].get("content") or ""))
        following = next(
            (n for n in range(place + 1, len(messages)) if messages[n].get("role") == "assistant"), len(messages)
        )
        if following < len(messages):
            if following == place + 1:
                raise DataError("two answers follow one another", where=where, got=f"messages {place} and {following}")
            conversation.say(messages[place + 1 : following])
        place = following
    return conversation
