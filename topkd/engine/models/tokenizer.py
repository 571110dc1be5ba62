"""A tokenizer from disk, or from the hub: one that has tokens, or one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from topkd.engine.models.hub import check_there
from topkd.topk.errors import ConfigError


def load_tokenizer(path: str) -> Any:
    """Load a Hugging Face tokenizer from a folder or a hub id; refuse one without tokens."""
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError("a tokenizer needs transformers", hint='pip install "topkd[train]"') from error

    check_there(path)
    logging.set_verbosity_error()  # its warning of long texts stands beside our own, clearer error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a folder may hold anything, and every library that reads it fails in its own way
        raise ConfigError(describe_load_failure(path, "a tokenizer"), got=quote_first_line(error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without one
        raise ConfigError(
            describe_load_failure(path, "a tokenizer"), got="no token but special ones",
            hint="put the model's tokenizer.json and tokenizer_config.json beside its weights",
        )  # fmt: skip
    return tokenizer


def describe_load_failure(path: str, what: str) -> str:
    """Describe what could not be loaded, as the beginning of an error's message."""
    kind = "folder" if Path(path).exists() else "no such folder here, and not loadable as a hub id"
    return f"cannot load {what} from {path!r} ({kind})"


def quote_first_line(error: Exception) -> str:
    """Quote the first line of a library's error, with its class where the words alone say little."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
    plain = isinstance(error, OSError | ValueError | RuntimeError) and line
    return line if plain else f"{type(error).__name__}: {line}".rstrip(": ")
