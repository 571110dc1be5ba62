"""Tokens and text: prompts, chat templates, single tokens, and where a completion ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from topkd.serve.engine.jobs import Completion
from topkd.serve.engine.refusal import Refusal
from topkd.serve.engine.sequences import GeneratedSequence

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are no character yet
# Whether a text ends inside a character is decided by its last few bytes, and every token but a special one has some.
_WINDOW = 8


class Fragments(dict[int, bytes]):
    """Pieces of JSON that repeat, made when they are first asked for."""

    def __init__(self, make: Callable[[int], bytes]) -> None:
        self._make = make

    def __missing__(self, key: int) -> bytes:
        self[key] = value = self._make(key)
        return value


class Vocabulary:
    """A tokenizer that caches the texts of single tokens.

    Attributes:
        entry_ends: The text of a token as JSON and a closing brace; empty where the text depends on the tokens before.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self.entry_ends = Fragments(self._entry_end)

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

    def _entry_end(self, token: int) -> bytes:
        own = self.alone(token)
        return b"" if own.endswith(UNFINISHED) else msgspec.json.encode(own) + b"}"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Encode ``text`` to ids."""
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=add_special_tokens)]

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text, special tokens included."""
        return str(self.tokenizer.decode(ids))

    def pieces(self, ids: list[int]) -> list[str]:
        """Return the tokenizer's own spelling of each id."""
        return [str(piece) for piece in self.tokenizer.convert_ids_to_tokens(ids)]

    def chat_template(self, requested: str | None = None) -> str | None:
        """Return the requested chat template, else the tokenizer's (of several its default)."""
        own = getattr(self.tokenizer, "chat_template", None)
        return requested or (own.get("default") if isinstance(own, dict) else own)

    def render(self, messages: list[dict[str, Any]], /, **options: Any) -> str:
        """Render ``messages`` with the chat template."""
        if not self.chat_template(options.get("chat_template")):
            raise Refusal("The tokenizer of this model has no chat template: send one, or use /v1/completions.")
        if not messages:
            raise Refusal("messages cannot be empty")
        try:
            return str(self.tokenizer.apply_chat_template(messages, **{**options, "tokenize": False}))
        except Exception as error:
            raise Refusal(f"The chat template failed: {type(error).__name__}: {error}") from error


class Endings:
    """The model's end-of-sequence ids and the decoding of completions.

    Args:
        tokenizer: Of the model.
        model: Its configurations name the end-of-sequence ids.
        holds_back: Leave tokens at the end that stop inside a character out of the text, as vLLM does; else they show
            as U+FFFD.
    """

    def __init__(self, tokenizer: Any, model: Any, *, holds_back: bool = True) -> None:
        self._tokenizer, self._holds_back = tokenizer, holds_back
        generation = getattr(model, "generation_config", None)
        found: set[int] = set()
        for owner in (generation, model.config, tokenizer):
            value = getattr(owner, "eos_token_id", None)
            found |= set(value if isinstance(value, list | tuple) else [] if value is None else [value])
        self.eos = frozenset(found)

    def apply(self, sequences: Iterable[GeneratedSequence]) -> None:
        """Mark the sequences whose last token ends them."""
        for sequence in sequences:
            self._check(sequence)

    def abort(self, sequence: GeneratedSequence) -> None:
        """End a sequence with finish reason "abort"."""
        if not sequence.done:
            sequence.done, sequence.out.finish_reason = True, "abort"

    def finish(self, sequence: GeneratedSequence) -> Completion:
        """Return the completion with its text."""
        out, sampling = sequence.out, sequence.sampling
        if sampling.detokenize and not isinstance(out.stop_reason, str):  # a stop string has cut the text already
            ids = out.token_ids
            # The token that stopped it belongs to the ids and their logprobs, but not to the text.
            if out.finish_reason == "stop" and not sampling.include_stop:
                ids = ids[:-1]
            out.text = self.text(sequence.job.ids, ids, skip=sampling.skip_special_tokens)
        return out

    def text(self, prompt: tuple[int, ...], ids: list[int], *, skip: bool = True) -> str:
        """Decode ``ids`` after ``prompt``: tokenizers that mark word starts drop a leading space without context.

        Args:
            prompt: Of the completion.
            ids: Of the completion, from its first on.
            skip: Leave special tokens out.
        """
        context = list(prompt[-6:])
        shown = self._finished(context, ids, skip=skip) if self._holds_back else ids
        before = self._decode(context, skip=skip)
        both = self._decode([*context, *shown], skip=skip)
        return both[len(before) :] if both.startswith(before) else self._decode(shown, skip=skip)

    def grow(self, sequence: GeneratedSequence) -> GrowingText:
        """Return the text of a completion in progress, which is nothing yet."""
        return GrowingText(sequence, lambda ids: self._decode(ids, skip=sequence.sampling.skip_special_tokens))

    def _finished(self, context: list[int], ids: list[int], *, skip: bool) -> list[int]:
        """Drop the ids at the end that only begin a character."""
        for end in range(len(ids), 0, -1):
            if not self._decode([*context, *ids[:end]][-_WINDOW:], skip=skip).endswith(UNFINISHED):
                return ids[:end]
        return []

    def _decode(self, ids: list[int], *, skip: bool) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip))

    def _check(self, sequence: GeneratedSequence) -> None:
        out, sampling = sequence.out, sequence.sampling
        last, count = out.token_ids[-1], len(out.token_ids)
        if sampling.stop and count == sampling.min_tokens:  # what is in the text by now ends nothing
            sequence.searched = len(self._text_so_far(sequence))
        if count > sampling.min_tokens:
            if last in sampling.stop_token_ids:
                sequence.done, out.finish_reason, out.stop_reason = True, "stop", last
                return
            if last in sequence.stops:
                sequence.done, out.finish_reason = True, "stop"
                return
            if sampling.stop and self._stop_string(sequence):
                return
        if count >= sequence.limit:
            sequence.done, out.finish_reason = True, "length"

    def _text_so_far(self, sequence: GeneratedSequence) -> str:
        return self.text(sequence.job.ids, sequence.out.token_ids, skip=sequence.sampling.skip_special_tokens)

    def _stop_string(self, sequence: GeneratedSequence) -> bool:
        """End a sequence at the stop string that was complete first, if one ends in what the last token added."""
        out, sampling = sequence.out, sequence.sampling
        text = self._text_so_far(sequence)
        places = [(text.find(word, max(0, sequence.searched - len(word) + 1)), word) for word in sampling.stop]
        sequence.searched = len(text)
        found = [(place, word) for place, word in places if place >= 0]
        if not found:
            return False
        place, word = min(found, key=lambda match: match[0] + len(match[1]))
        out.text = text[: place + len(word)] if sampling.include_stop else text[:place]
        sequence.done, out.finish_reason, out.stop_reason = True, "stop", word
        return True


class GrowingText:
    """The text of a completion in progress, as far as no later token changes it.

    Each call decodes a few tokens only. What ``take`` returned is the beginning of the text of ``Endings.finish``.

    Args:
        sequence: The completion.
        decode: Decodes ids.
    """

    def __init__(self, sequence: GeneratedSequence, decode: Callable[[list[int]], str]) -> None:
        self._out, self._decode = sequence.out, decode
        context = list(sequence.job.ids[-6:])
        self._ids = [] if decode(context).endswith(UNFINISHED) else context
        self._begin, self._shown = 0, len(self._ids)  # ids before the first are settled, up to the second in the text
        self._text, self._count, self._taken = "", 0, 0
        stop = () if sequence.sampling.include_stop else sequence.sampling.stop
        self._held = max(map(len, stop), default=1) - 1  # characters that may be the beginning of a stop string

    def take(self, count: int) -> str:
        """Return what is new in the text of the first ``count`` tokens."""
        for token in self._out.token_ids[self._count : count]:
            self._ids.append(token)
            before, now = self._decode(self._ids[self._begin : self._shown]), self._decode(self._ids[self._begin :])
            if len(now) > len(before) and not now.endswith(UNFINISHED):
                self._text += now[len(before) :]
                self._begin, self._shown = self._shown, len(self._ids)
        self._count = count
        return self._cut(max(self._taken, len(self._text) - self._held))

    def finish(self, text: str) -> str:
        """Return what the whole text has beyond what was taken.

        Raises:
            Refusal: The tokenizer changes earlier text when tokens follow (500).
        """
        if not text.startswith(self._text[: self._taken]):
            message = (
                "The text of this tokenizer changes as tokens follow, so it cannot be streamed: send stream=false."
            )
            raise Refusal(message, status=500, kind="InternalServerError")
        self._text = text
        return self._cut(len(text))

    def _cut(self, end: int) -> str:
        piece, self._taken = self._text[self._taken : end], end
        return piece
