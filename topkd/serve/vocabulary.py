"""Ids to text and back: prompts, chat templates, and the text and bytes of single tokens."""

from __future__ import annotations

from typing import Any

from topkd.serve.refusal import Refusal


class Vocabulary:
    """A tokenizer with the texts of single tokens remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._byte_of = _byte_level_alphabet() if _is_byte_level(tokenizer) else None

    def text(self, token: int) -> str:
        """What one token reads as; "" for one that ends inside a character, as vLLM shows it."""
        known = self._texts.get(token)
        if known is None:
            known = str(self.tokenizer.decode([token]))
            if known.endswith("\ufffd"):
                known = ""
            self._texts[token] = known
        return known

    def raw(self, token: int) -> bytes:
        """The bytes one token stands for, its own even when it is part of a character."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if self._byte_of is not None and piece is not None and all(char in self._byte_of for char in piece):
            return bytes(self._byte_of[char] for char in piece)
        return self.text(token).encode()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of ``text``."""
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=add_special_tokens)]

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, specials included."""
        return str(self.tokenizer.decode(ids))

    def pieces(self, ids: list[int]) -> list[str]:
        """The tokenizer's own spelling of each id."""
        return [str(piece) for piece in self.tokenizer.convert_ids_to_tokens(ids)]

    def chat(self, messages: list[dict[str, Any]], *, add_special_tokens: bool = False, **options: Any) -> list[int]:
        """Ids of ``messages`` under the chat template: rendered once, then encoded."""
        if getattr(self.tokenizer, "chat_template", None) is None and not options.get("chat_template"):
            raise Refusal("The tokenizer of this model has no chat template: send one, or use /v1/completions.")
        if not messages:
            raise Refusal("messages cannot be empty")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:
            raise Refusal(f"The chat template failed: {type(error).__name__}: {error}") from error
        return self.encode(str(text), add_special_tokens=add_special_tokens)


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in type(backend.decoder).__name__ + str(backend.decoder)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte, inverted."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(hidden)}
