"""Check in seconds whether a model that is no folder here can be found on the hub."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from topkd.topk.errors import ConfigError

_PATIENCE_S = 5.0
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")


def check_there(model: str) -> None:
    """Refuse a name that is no folder, is not in the hub's cache, and cannot be downloaded because no hub answers.

    The hub's library itself would retry for half a minute first.
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
        raise ConfigError("neither a model folder nor a hub id", where=model) from error
    if constants.HF_HUB_OFFLINE or any(os.environ.get(name) or os.environ.get(name.lower()) for name in _PROXIES):
        return  # the library answers at once, or goes by a way that cannot be tried from here
    hub = urlsplit(constants.ENDPOINT)
    try:
        port = hub.port or (443 if hub.scheme == "https" else 80)
        socket.create_connection((hub.hostname or "", port), timeout=_PATIENCE_S).close()
    except OSError as error:
        raise ConfigError(
            "no such model folder here, and the hub cannot be reached", where=model,
            got=f"{hub.hostname}: {error.strerror or error}", hint="check the spelling, or download the model first",
        ) from error  # fmt: skip
