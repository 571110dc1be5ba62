"""Conversations of several turns, built by appending ids: no answer is rendered and tokenized again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from topkd.compose.data.chat_templates import Message, Side
from topkd.topk.errors import DataError
from topkd.topk.types import Bool, Int32


class Conversation:
    """The ids of a conversation as the model saw them, and which of them the assistant wrote.

    To render the whole history again would change it: templates drop thinking from earlier answers, and a decoded
    answer may get other tokens. Here the template writes only the text between two answers.

    Args:
        side: The side whose template is used.
        messages: All messages before the first answer.
        where: Name of the conversation in errors.
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
        """Return int32 [T], all ids so far; the next answer goes after them, unless they end with an answer."""
        return np.array(self._ids, dtype=np.int32)

    @property
    def mask(self) -> Bool:
        """Return bool [T], True for the assistant's tokens, on which a student is trained."""
        return np.array(self._mask, dtype=np.bool_)

    def answer(self, content: str, ids: Sequence[int] | None = None) -> None:
        """Append an answer: ``ids`` exactly as sampled, or else the ids of ``content`` and of the template's end."""
        if ids is None:
            end = self._end()
            ids = [*self._side.text(content, self._where, special=False), *end]
        if len(ids) == 0:
            raise DataError("an answer needs at least one token", where=self._where)
        self._ids += [int(token) for token in ids]
        self._mask += [True] * len(ids)
        self._last = content

    def say(self, messages: Sequence[Message]) -> None:
        """Append messages after an answer, up to the start of the next answer; none of their tokens are trained."""
        behind = self._side.behind_answer(self._messages, messages, self._where)
        ids = self._side.text(behind, self._where, special=False)
        if ids and self._mask[-1]:  # leave out the part of the answer's end that was sampled
            end = self._end()
            have = next((n for n in range(len(end), 0, -1) if self._ids[-n:] == end[:n]), 0)
            ids = ids[have:]
        self._ids += ids
        self._mask += [False] * len(ids)
        self._messages += [{"role": "assistant", "content": self._last}, *messages]

    def _end(self) -> list[int]:
        """Return the tokens that end an answer, up to the template's end token, without the line break after it."""
        behind = self._side.behind_answer(self._messages, [], self._where)
        ids = self._side.text(behind, self._where, special=False)
        special = self._side.special_ids()
        ends = [place for place, token in enumerate(ids) if token in special]
        return ids[: ends[0] + 1] if ends else []


def read_conversation(side: Side, messages: Sequence[Message], first: int, where: str) -> Conversation:
    """Read a finished conversation: ``messages[first]`` is the first answer; all answers from it on are trained."""
    conversation = Conversation(side, messages[:first], where)
    index = first
    while index < len(messages):
        conversation.answer(str(messages[index].get("content") or ""))
        following = next(
            (n for n in range(index + 1, len(messages)) if messages[n].get("role") == "assistant"), len(messages)
        )
        if following < len(messages):
            if following == index + 1:
                raise DataError("two answers follow one another", where=where, got=f"messages {index} and {following}")
            conversation.say(messages[index + 1 : following])
        index = following
    return conversation
