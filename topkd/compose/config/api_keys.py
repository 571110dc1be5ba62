"""API keys: a config or command line has the name of the environment variable with the key, never the key."""

from __future__ import annotations

import os
import re
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, SecretStr

from topkd.topk.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NOT_A_NAME = "the name of an environment variable, not the key itself"


def _check_env_name(variable: str) -> str:
    """Refuse a key in place of the name of its variable: the run folder would store the key."""
    if not _NAME.fullmatch(variable):
        raise ValueError(_NOT_A_NAME)
    return variable


KeyVariable: TypeAlias = Annotated[str, AfterValidator(_check_env_name)]


def read_api_key(variable: str | None, *, source: str) -> SecretStr | None:
    """Read a key from the environment; raise ConfigError if the variable is not set.

    Args:
        variable: Name of the variable; None if no key is needed.
        source: The config key or option that named it, for messages.
    """
    if variable is None:
        return None
    if not _NAME.fullmatch(variable):
        raise ConfigError(source, expected=_NOT_A_NAME)
    value = os.environ.get(variable)
    if not value:
        raise ConfigError(f"the environment variable {variable} ({source}) is not set")
    return SecretStr(value)
