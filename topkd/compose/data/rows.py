"""Rows of a data file, and their prompts for the student and for the teacher, which may see more."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from topkd.compose.config.errors import describe_error
from topkd.compose.config.tables import PRIVILEGED, PrivilegedConfig
from topkd.compose.data.chat_templates import Side
from topkd.topk.errors import DataError


class DataRow(BaseModel):
    """One row; columns that topkd does not use (a source, a difficulty) are allowed too.

    Only the teacher sees ``hint``, ``reference`` and ``feedback``. ``teacher_prompt_ids`` replaces them in rows of ids:
    it is the teacher's whole prompt. ``completion`` and ``completion_ids`` are an answer from the data.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    prompt_ids: list[int] | None = None
    teacher_prompt_ids: list[int] | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    completion_ids: list[int] | None = None
    completion: str | None = None
    id: str | int | None = None
    teacher_id: str = ""
    hint: str | None = None
    reference: str | None = None
    feedback: str | None = None

    @field_validator("prompt", "messages", "completion", "id", "teacher_id", *PRIVILEGED)
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        """Refuse half of a character (a lone surrogate): JSON can hold it, but tokenizers refuse it."""
        try:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text without half a character (a lone surrogate, at {error.start})") from None
        except RecursionError:
            raise ValueError("a value with fewer nested levels") from None
        return value

    @property
    def privileged(self) -> dict[str, str]:
        """Return the text that only the teacher may see, by column."""
        return {name: text for name in PRIVILEGED if (text := getattr(self, name)) is not None}


R = TypeVar("R", bound=DataRow)


def parse_row(model: type[R], raw: dict[str, Any], where: str) -> R:
    """Parse a row of a data file; a null (a table has every column in every row) counts as an absent key."""
    try:
        return model.model_validate({key: _drop_nulls(value) for key, value in raw.items() if value is not None})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key, got = ".".join(map(str, problem["loc"])) or "the row", reprlib.repr(problem["input"])
        raise DataError(f"{key} cannot be read", where=where, got=got, expected=describe_error(problem)) from None


def check_row(raw: dict[str, Any], where: str) -> DataRow:
    """Parse a row with a prompt, in exactly one of its three forms."""
    row = parse_row(DataRow, raw, where)
    forms = [name for name in ("prompt_ids", "prompt", "messages") if getattr(row, name) is not None]
    if len(forms) != 1:
        raise DataError(
            "a row needs exactly one of prompt_ids, prompt, messages", where=where, got=forms or "none of them"
        )
    strays = {"completion": "prompt", "completion_ids": "prompt_ids", "teacher_prompt_ids": "prompt_ids"}
    for name, form in strays.items():
        if getattr(row, name) is not None and form != forms[0]:
            raise DataError(f"{name} goes only with {form}", where=where, got=f"a row with {forms[0]}")
    return row


def _drop_nulls(value: Any) -> Any:
    """Drop nulls of messages: in a table every message has every field that any message has."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [{key: entry for key, entry in message.items() if entry is not None} for message in value]
    return value


def tokenize_prompt(row: DataRow, tokenizer: Any, privileged: dict[str, str], where: str) -> list[int]:
    """Tokenize the prompt with the tokenizer's own template; with ``privileged``, as the teacher sees it."""
    return render_prompt(row, Side(tokenizer), privileged, PrivilegedConfig(), where)


def render_prompt(
    row: DataRow, side: Side, privileged: dict[str, str], templates: PrivilegedConfig, where: str
) -> list[int]:
    """Tokenize the prompt for one side, with the text that only this side sees.

    Args:
        row: A row with a prompt in one of its three forms; the messages of a conversation end before the answer.
        side: The side, with its tokenizer and its template.
        privileged: Column -> text; empty for the student.
        templates: How to put each of these texts into the prompt.
        where: Name of the row in errors.
    """
    if row.prompt_ids is not None:
        ids: Sequence[int] = _add_privileged_ids(row.prompt_ids, side, privileged, templates, where)
    elif row.prompt is not None:
        ids = side.text(_add_privileged_text(row.prompt, privileged, templates), where)
    else:
        ids = side.chat(_add_privileged_messages(row.messages or [], privileged, templates, where), where)
    return check_token_ids(ids, "a prompt", where)


def check_token_ids(ids: Sequence[int], what: str, where: str) -> list[int]:
    """Return the ids if each can be a token id (0 to 2**31 - 1); other checks compare with the vocabulary's size."""
    if not len(ids) or min(ids) < 0:
        raise DataError(f"{what} needs at least one token and no negative id", where=where, got=list(ids[:8]))
    if max(ids) > np.iinfo(np.int32).max:
        raise DataError("a token id is out of range", where=where, got=max(ids), expected="below 2**31")
    return [int(token) for token in ids]


def _add_privileged_ids(
    ids: Sequence[int], side: Side, privileged: dict[str, str], templates: PrivilegedConfig, where: str
) -> Sequence[int]:
    """Put privileged text before the prompt's ids, but after their start token, if they have one."""
    before = ""
    for name, extra_text in privileged.items():
        template = getattr(templates, name)
        if "{prompt}" in template:
            raise DataError(
                f"the template of {name} contains the text of a prompt, and this row has ids", where=where,
                hint=f"give the teacher's whole prompt as teacher_prompt_ids, or a data.privileged.{name} "
                "without {prompt}, which goes before the ids",
            )  # fmt: skip
        before = f"{_fill_template(template, {name: extra_text})}\n{before}"
    if not before:
        return ids
    text = side.text(before, where, special=False)
    opening = int(bool(ids) and ids[0] == side.tokenizer.bos_token_id)
    return [*ids[:opening], *text, *ids[opening:]]


def _add_privileged_text(prompt: str, privileged: dict[str, str], templates: PrivilegedConfig) -> str:
    for name, extra_text in privileged.items():
        template = getattr(templates, name)
        text = _fill_template(template, {name: extra_text, "prompt": prompt})
        prompt = text if "{prompt}" in template else f"{text}\n{prompt}"
    return prompt


def _add_privileged_messages(
    messages: Sequence[dict[str, Any]], privileged: dict[str, str], templates: PrivilegedConfig, where: str
) -> list[dict[str, Any]]:
    extra_text = [dict(message) for message in messages]
    for name, secret in privileged.items():
        template = getattr(templates, name)
        if "{prompt}" not in template:
            text = _fill_template(template, {name: secret})
            if extra_text and extra_text[0].get("role") == "system":
                extra_text[0]["content"] = f"{text}\n\n{_read_content(extra_text[0], where)}"
            else:
                extra_text.insert(0, {"role": "system", "content": text})
            continue
        last = next((message for message in reversed(extra_text) if message.get("role") == "user"), None)
        if last is None:
            raise DataError(f"the template of {name} needs a message of the user, and there is none", where=where)
        last["content"] = _fill_template(template, {name: secret, "prompt": _read_content(last, where)})
    return extra_text


def _read_content(message: dict[str, Any], where: str) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise DataError("privileged text can only go into a message of text", where=where, got=type(content).__name__)
    return content


def _fill_template(template: str, values: dict[str, str]) -> str:
    """Replace every ``{name}`` in one pass: braces in the values stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)
