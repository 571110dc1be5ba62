"""Turns a prompt into token ids for one side (student or teacher), with its tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from topkd.topk.errors import ConfigError, DataError

Message: TypeAlias = Mapping[str, Any]

_MARK = "\N{BLACK DIAMOND}topkd\N{BLACK DIAMOND}"  # placeholder for an answer, to find the text after it


@dataclass(frozen=True, slots=True)
class Side:
    """How the student, or a teacher, turns prompts into ids.

    Attributes:
        tokenizer: The student's (the teacher's has the same ids); None if all rows hold ids.
        chat_template: Jinja text that replaces the tokenizer's own template.
        kwargs: Arguments of the template, such as ``enable_thinking = false``.
    """

    tokenizer: Any
    chat_template: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any, template_file: str | None, kwargs: Mapping[str, Any]) -> Side:
        """Build a side with a template from a file."""
        if template_file is None:
            return cls(tokenizer, None, dict(kwargs))
        try:
            return cls(tokenizer, Path(template_file).read_text(encoding="utf-8"), dict(kwargs))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError("cannot read the chat template", where=template_file, got=reason) from error

    def text(self, text: str, where: str, *, special: bool = True) -> list[int]:
        """Tokenize plain text; with ``special``, the tokenizer may add its start token."""
        if self.tokenizer is None:
            raise ConfigError("text prompts need the student's tokenizer", where=where)
        return [int(token) for token in self.tokenizer(text, add_special_tokens=special)["input_ids"]]

    def chat(self, messages: Sequence[Message], where: str) -> list[int]:
        """Tokenize a conversation, up to the start of the assistant's answer."""
        rendered = self._render(messages, where, tokenize=True, add_generation_prompt=True)
        return [int(token) for token in rendered]

    def behind_answer(self, messages: Sequence[Message], later: Sequence[Message], where: str) -> str:
        """Return the template's text after the answer to ``messages``: its end, ``later``, the next answer's start.

        Without later messages it is only the end of the answer.
        """
        whole = [*messages, {"role": "assistant", "content": _MARK}, *later]
        text = str(self._render(whole, where, tokenize=False, add_generation_prompt=bool(later)))
        _, mark, behind = text.rpartition(_MARK)
        if not mark:
            raise DataError("the chat template changes the text of an answer", where=where, hint="give prompt_ids")
        return behind

    def answer_end(self) -> int | None:
        """Return the special token that the template writes directly after an answer; None if it writes none."""
        if self.tokenizer is None or not (self.chat_template or getattr(self.tokenizer, "chat_template", None)):
            return None
        behind = self.behind_answer([{"role": "user", "content": "Hello"}], [], "the chat template")
        ids = self.text(behind, "the chat template", special=False)
        return ids[0] if ids and ids[0] in self.special_ids() else None

    def special_ids(self) -> set[int]:
        """Return the ids of control tokens: the tokenizer's own (end of text), and those that were added to it."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {*self.tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}

    def _render(self, messages: Sequence[Message], where: str, **options: Any) -> Any:
        if self.tokenizer is None:
            raise ConfigError("messages need the student's tokenizer", where=where)
        if not (self.chat_template or getattr(self.tokenizer, "chat_template", None)):
            raise DataError(
                "messages need a chat template, the student's tokenizer has none", where=where,
                hint="name a Jinja file in student.chat_template",
            )  # fmt: skip
        from jinja2 import TemplateError  # comes with chat templates

        if options.get("tokenize"):
            options["return_dict"] = False
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.chat_template, **options, **self.kwargs
            )
        except TemplateError as error:
            raise DataError("the chat template rejects these messages", where=where, got=str(error)) from error
        except (TypeError, ValueError, KeyError) as error:
            raise DataError("the chat template cannot render these messages", where=where, got=str(error)) from error
