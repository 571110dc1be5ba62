"""A command that needs an extra says which, before anything else happens."""

from __future__ import annotations

from importlib.util import find_spec

from topkd.topk.errors import ConfigError


def needs(command: str, *modules: str, extra: str) -> None:
    """Raise one clear line when a module of the extra is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"topkd {command} needs {', '.join(missing)}", hint=f"install them with: pip install 'topkd[{extra}]'"
        )
