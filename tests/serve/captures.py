"""Replies of a real vLLM 0.32, and how another reply may differ from one and still have its shape.

Values differ (another model, another tokenizer); keys, types, list lengths, statuses and words of errors must not.
"""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parents[1] / "golden" / "vllm-0.32.0"

# Free text, and numbers that name a moment: only their type is compared.
FREE = {
    "id",
    "request_id",
    "created",
    "text",
    "content",
    "decoded_token",
    "token",
    "system_fingerprint",
    "owned_by",
    "root",
    "parent",
}
# What was drawn decides these; each must be one of the values vLLM has for it.
DRAWN = {"finish_reason": {"length", "stop"}}
# Written by a server flag of the recorded server (--enable-prompt-tokens-details), null without it.
FLAGS = {"prompt_tokens_details"}
# As long as the text of a token.
LENGTH_OF_TEXT = {"bytes"}
# As long as the prompt: with a prompt of text that is up to the tokenizer.
LENGTH_OF_PROMPT = {"prompt_logprobs", "prompt_token_ids"}


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def names(pattern: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json") if re.match(pattern, path.stem))


def differences(got: Any, want: Any, *, text_prompt: bool = False, path: str = "") -> list[str]:
    """Where ``got`` has not the shape of ``want``; empty when it has."""
    key = re.sub(r"\[\d+\]$", "", path.rsplit(".", 1)[-1])
    if key in FLAGS:
        return []
    if key in DRAWN:
        return [] if got in DRAWN[key] else [f"{path}: {got!r} is none of {DRAWN[key]}"]
    if key == "message" and isinstance(want, str):
        return [] if got == want else [f"{path}: {got!r} instead of {want!r}"]
    if key == "prompt_token_id_logprobs" and isinstance(want, str):
        mine, theirs = _array(got), _array(want)
        same = (
            mine.shape == theirs.shape
            and mine.dtype == theirs.dtype
            and (np.isneginf(mine) == np.isneginf(theirs)).all()
        )
        return [] if same else [f"{path}: {mine.dtype}{mine.shape} instead of {theirs.dtype}{theirs.shape}"]
    if type(got) is not type(want):
        return [f"{path}: {type(got).__name__} instead of {type(want).__name__}"]
    if isinstance(want, dict):
        return _object(got, want, text_prompt, path)
    if isinstance(want, list):
        return _array_of(got, want, text_prompt, path, key)
    if isinstance(want, str | bool) and key not in FREE and not _holds_tokens(path):
        return [] if got == want else [f"{path}: {got!r} instead of {want!r}"]
    if isinstance(want, float) and (want == -9999.0) != (got == -9999.0):
        return [f"{path}: {got} where vLLM has {want}"]
    return []


def _object(got: dict[str, Any], want: dict[str, Any], text_prompt: bool, path: str) -> list[str]:
    if all(re.fullmatch(r"\d+|token_id:\d+", key) for key in want) or all(isinstance(v, float) for v in want.values()):
        return _ids(got, want, path)
    found = [f"{path}: without {key!r}" for key in want.keys() - got.keys()]
    found += [f"{path}: with {key!r}" for key in got.keys() - want.keys()]
    for key in want.keys() & got.keys():
        found += differences(got[key], want[key], text_prompt=text_prompt, path=f"{path}.{key}")
    return found


def _ids(got: dict[str, Any], want: dict[str, Any], path: str) -> list[str]:
    """Objects keyed by token: K entries, or K + 1 when the token itself is outside the list; texts may collide."""
    by_text = not all(re.fullmatch(r"\d+|token_id:\d+", key) for key in [*want, *got])
    if abs(len(got) - len(want)) > (2 if by_text else 1):
        return [f"{path}: {len(got)} entries instead of {len(want)}"]
    if bool(got) != bool(want):
        return [f"{path}: {got} instead of {want}"]
    if not want:
        return []
    examples = list(want.values())
    if isinstance(examples[0], float):
        counts = [list(side.values()).count(-9999.0) for side in (got, want)]
        return [] if counts[0] == counts[1] else [f"{path}: {counts[0]} sentinels instead of {counts[1]}"]
    return [line for value in got.values() for line in differences(value, examples[-1], path=f"{path}.entry")]


def _array_of(got: list[Any], want: list[Any], text_prompt: bool, path: str, key: str) -> list[str]:
    free_length = key in LENGTH_OF_TEXT or (text_prompt and key in LENGTH_OF_PROMPT)
    if len(got) != len(want) and not free_length:
        return [f"{path}: {len(got)} items instead of {len(want)}"]
    return [
        line
        for index, (mine, theirs) in enumerate(zip(got, want, strict=False))
        for line in differences(mine, theirs, text_prompt=text_prompt, path=f"{path}[{index}]")
    ]


def _holds_tokens(path: str) -> bool:
    return bool(re.search(r"\.(tokens|token_strs)\[\d+\]$", path))


def _array(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
