"""Checks that prompts and completions fit, and that student, template and teachers end text with the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.prompts import Prompts
from topkd.compose.preflight.teachers import TeacherInfo
from topkd.engine.loop.prompts import PromptRow
from topkd.topk.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Ends:
    """The tokens that end a completion, for student, chat template and teachers.

    Attributes:
        stops: Ids that end a completion in this run.
        template: The token that the student's chat template writes after an answer; None if it writes none.
        teachers: teacher_id -> the end-of-text id of that teacher's tokenizer, if it is available.
        notes: Warnings about tokens that differ.
    """

    stops: tuple[int, ...]
    template: int | None
    teachers: dict[str, int]
    notes: tuple[str, ...] = ()


def check_lengths(config: RunConfig, prompts: Prompts, teachers: Mapping[str, TeacherInfo]) -> None:
    """Raise ConfigError if the longest prompt with its completion is too long for the student or a teacher."""
    room = config.rollout.max_completion_tokens
    limit = read_position_limit(config.student.model)
    longest = max(prompts.rows, key=lambda row: row.prompt_ids.size + _count_answer_tokens(row, room))
    if limit is not None and longest.prompt_ids.size + _count_answer_tokens(longest, room) > limit:
        raise ConfigError(
            "a prompt and its completion do not fit the student's context",
            where=f"{config.data.path}, {longest.sample_id}",
            got=f"{longest.prompt_ids.size} + {_count_answer_tokens(longest, room)} tokens",
            expected=f"at most {limit}",
            hint="lower rollout.max_completion_tokens or rollout.max_prompt_tokens",
        )
    for name, teacher in teachers.items():
        rows = [row for row in prompts.rows if row.teacher_id == name]
        if not rows or teacher.context is None:
            continue
        longest = max(rows, key=lambda row: row.teacher_prompt_ids.size)
        size = longest.teacher_prompt_ids.size
        if size + room + 1 > teacher.context:  # scoring generates one token
            raise ConfigError(
                "a prompt and its completion do not fit the teacher's context",
                where=f"{teacher.url}, model {teacher.model}; {config.data.path}, {longest.sample_id}",
                got=f"{size} + {room} + 1 tokens", expected=f"at most {teacher.context}",
                hint="lower rollout.max_completion_tokens or rollout.max_prompt_tokens, "
                f"or serve with --max-model-len {size + room + 1}",
            )  # fmt: skip


def _count_answer_tokens(row: PromptRow, room: int) -> int:
    """Count the most tokens that can follow a prompt: a sampled completion, or the row's own."""
    return room if row.completion_ids is None else max(room, row.completion_ids.size)


def read_position_limit(model: str) -> int | None:
    """Read the context length from a model folder's config; None if it has none."""
    return _read_model_config(model, "max_position_embeddings")


def read_vocab_size(model: str) -> int | None:
    """Read the number of token ids from a model folder's config; None if it has none."""
    return _read_model_config(model, "vocab_size")


def _read_model_config(model: str, name: str) -> int | None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return None  # the error is raised where the model is loaded
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, name, None)
    return int(found) if isinstance(found, int) and found > 0 else None


def list_stop_ids(tokenizer: Any, more: Iterable[int] = ()) -> tuple[int, ...]:
    """List the ids that end a completion of the student: its tokenizer's end-of-text id, and ``more``."""
    end = None if tokenizer is None else tokenizer.eos_token_id
    return tuple(dict.fromkeys([*([] if end is None else [int(end)]), *more]))


def compare_ends(config: RunConfig, prompts: Prompts) -> Ends:
    """Compare the tokens with which student, chat template and teachers end a completion; change nothing."""
    from topkd.engine.models.tokenizer import load_tokenizer

    tokenizer = prompts.tokenizer
    stops = list_stop_ids(tokenizer, config.rollout.stop_token_ids)
    chat = any("messages" in row.columns for row in prompts.rows)
    template = prompts.readers.student.answer_end() if chat else None
    notes = []
    shown = " or ".join(_show_token(tokenizer, stop) for stop in stops) or "nothing"
    if not stops:
        notes.append(
            "the student's tokenizer has no end-of-text token: every completion has "
            f"{config.rollout.max_completion_tokens} tokens; set rollout.stop_token_ids"
        )
    if template is not None and template not in stops:
        notes.append(
            f"the chat template ends an answer with {_show_token(tokenizer, template)}, but the student stops only at "
            f"{shown}: "
            "a teacher that was trained on the template ends there, and its scores of the student's text after that "
            "token mean nothing; "
            f"set rollout.stop_token_ids = [{template}]"
        )
    teachers = {}
    for name, teacher in config.teacher_map().items():
        folder = teacher.tokenizer or (teacher.model if teacher.kind == "local" else None)
        if folder is None:
            continue
        end = load_tokenizer(folder).eos_token_id
        if end is None:
            continue
        teachers[name] = int(end)
        if int(end) not in stops:
            who = f"teacher {name!r}" if name else "the teacher"
            notes.append(
                f"{who} ends its text with {_show_token(tokenizer, int(end))}, the student with {shown}: "
                f"the student "
                "learns an end token at which its own sampling does not stop; "
                f"set rollout.stop_token_ids = [{int(end)}] (usual for a base student of an instruct teacher)"
            )
    return Ends(stops, template, teachers, tuple(notes))


def _show_token(tokenizer: Any, token: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})"


def check_token_ids_fit(config: RunConfig, rows: list[PromptRow], vocab_size: int) -> None:
    """Raise if a stop id in the config, or an id in a row, is not below the student's ``vocab_size``."""
    for stop in config.rollout.stop_token_ids:
        if stop >= vocab_size:
            raise ConfigError(
                "rollout.stop_token_ids holds an id that the student does not have", got=stop,
                expected=f"below {vocab_size}",
            )  # fmt: skip
    for row in rows:
        top = max(int(ids.max()) for ids in (row.prompt_ids, row.completion_ids) if ids is not None)
        if top >= vocab_size:
            raise DataError(
                "a row holds an id that the student does not have", where=f"{config.data.path}, {row.sample_id}",
                got=top, expected=f"below {vocab_size}", hint="was the file made with another tokenizer?",
            )  # fmt: skip
