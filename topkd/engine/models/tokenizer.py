"""Load a tokenizer; find out in seconds whether a model's folder or hub id can be loaded at all."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from topkd.topk.errors import ConfigError

_PATIENCE_S = 5.0
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")


def load_tokenizer(path: str) -> Any:
    """Load a Hugging Face tokenizer from a folder or a hub id; refuse one without tokens."""
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError("a tokenizer needs transformers", hint='pip install "topkd[train]"') from error

    check_there(path)
    logging.set_verbosity_error()  # its warning about long texts would repeat our own, clearer error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a folder may hold anything, and every library that reads it fails in its own way
        raise ConfigError(describe_load_failure(path, "a tokenizer"), got=quote_first_line(error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers returns this for a folder without a tokenizer
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
    """Quote the first line of a library's error, with its class where the text alone is not clear."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
    plain = isinstance(error, OSError | ValueError | RuntimeError) and line
    return line if plain else f"{type(error).__name__}: {line}".rstrip(": ")


def check_there(model: str) -> None:
    """Refuse a name that is not a folder, not in the hub's cache, and not downloadable because no hub answers.

    The hub's own library would retry for half a minute first.
    """
    if os.path.exists(model):  # noqa: PTH110 - of a name too long for a path it says no; pathlib raises
        return
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        hint = "" if model.startswith("/") else f"a relative path is taken from {os.getcwd()}"  # noqa: PTH109 - as above
        raise ConfigError("no such model folder", where=model, hint=hint)
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if any(isinstance(try_to_load_from_cache(model, name), str) for name in _FILES):
            return
    except HFValidationError as error:
        raise ConfigError("this is neither a model folder nor a valid hub id", where=model) from error
    if constants.HF_HUB_OFFLINE or any(os.environ.get(name) or os.environ.get(name.lower()) for name in _PROXIES):
        return  # offline the library fails at once; a proxy cannot be tried from here
    hub = urlsplit(constants.ENDPOINT)
    try:
        port = hub.port or (443 if hub.scheme == "https" else 80)
        socket.create_connection((hub.hostname or "", port), timeout=_PATIENCE_S).close()
    except OSError as error:
        raise ConfigError(
            "no such model folder here, and the hub cannot be reached", where=model,
            got=f"{hub.hostname}: {error.strerror or error}", hint="check the spelling, or download the model first",
        ) from error  # fmt: skip
