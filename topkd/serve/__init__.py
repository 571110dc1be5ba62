"""The embedded server: any Hugging Face causal LM behind vLLM's dialects, for laptops, tests and the demo.

Knows: requests and replies as vLLM 0.32 writes them, batching, sampling, weight reloads. Does not know: clients,
caches, training. Importing it loads neither torch nor transformers; ``load_model``, ``create_app`` and ``serve`` do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from topkd.serve.config import ServeConfig
from topkd.serve.process import ServerProcess

if TYPE_CHECKING:
    from topkd.serve.app import create_app
    from topkd.serve.model.loading import load_model
    from topkd.serve.run import serve

__all__ = ["ServeConfig", "ServerProcess", "create_app", "load_model", "serve"]

_LAZY = {"create_app": "app", "load_model": "model.loading", "serve": "run"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
