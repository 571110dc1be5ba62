"""API keys: where they come from, and that they never show."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import SecretStr

from topkd.topk.errors import ConfigError


def load_key(api_key: str | SecretStr | None, *, where: str = "") -> SecretStr | None:
    """The key itself, masked in repr.

    Args:
        api_key: ``"env:NAME"`` (an environment variable), ``"file:PATH"`` (its first line), a key, or None for none.
        where: Endpoint for the error message.
    """
    if api_key is None:
        return None
    value = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
    if value.startswith("env:"):
        name = value.removeprefix("env:")
        if not os.environ.get(name):
            raise ConfigError(
                f"environment variable {name} is not set", where=where, hint=f"export {name}=<the API key>"
            )
        value = os.environ[name]
    elif value.startswith("file:"):
        path = Path(value.removeprefix("file:")).expanduser()
        try:
            value = path.read_text(encoding="utf-8").partition("\n")[0]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the API key file {path}", where=where, got=type(error).__name__) from error
    value = value.strip()
    if not value:
        return None
    if not value.isascii() or not value.isprintable():
        # Refused here, without showing it: the HTTP layer would quote the whole header in its own error.
        raise ConfigError("the API key holds characters that an HTTP header cannot carry", where=where)
    return SecretStr(value)
