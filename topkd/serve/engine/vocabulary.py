"""Encoding and decoding: prompts, chat templates, and the text of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from topkd.serve.engine.refusal import Refusal

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are no character yet


class Vocabulary:
    """A tokenizer that caches the texts of single tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def alone(self, token: int) -> str:
        """Return the text of one token by itself."""
        known = self._texts.get(token)
        if known is None:
            known = self._texts[token] = str(self.tokenizer.decode([token]))
        return known

    def text(self, token: int, before: Sequence[int] = ()) -> str:
        """Return what one token adds to the text, as vLLM shows it.

        A token that ends inside a character adds nothing; the one that completes it adds the whole character.

        Args:
            token: The token.
            before: Tokens in front of it: a character has at most four bytes, so four are looked at.
        """
        own = self.alone(token)
        if not own.endswith(UNFINISHED):
            return own
        if not before or not self.alone(before[-1]).endswith(UNFINISHED):
            return ""
        for count in range(1, min(4, len(before)) + 1):
            context = list(before[-count:])
            whole = self.decode([*context, token])
            if whole.endswith(UNFINISHED):
                continue
            while context and self.alone(context[-1]).endswith(UNFINISHED):
                context.pop()
            return whole.removeprefix(self.decode(context))
        return ""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Encode ``text`` to ids."""
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=add_special_tokens)]

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text, special tokens included."""
        return str(self.tokenizer.decode(ids))

    def pieces(self, ids: list[int]) -> list[str]:
        """Return the tokenizer's own spelling of each id."""
        return [str(piece) for piece in self.tokenizer.convert_ids_to_tokens(ids)]

    def chat(self, messages: list[dict[str, Any]], *, add_special_tokens: bool = False, **options: Any) -> list[int]:
        """Render ``messages`` with the chat template and encode them."""
        if getattr(self.tokenizer, "chat_template", None) is None and not options.get("chat_template"):
            raise Refusal("The tokenizer of this model has no chat template: send one, or use /v1/completions.")
        if not messages:
            raise Refusal("messages cannot be empty")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:
            raise Refusal(f"The chat template failed: {type(error).__name__}: {error}") from error
        return self.encode(str(text), add_special_tokens=add_special_tokens)
