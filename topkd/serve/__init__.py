"""The embedded server: any Hugging Face causal LM behind vLLM's dialects, for laptops, tests and the demo.

Knows: requests and replies as vLLM 0.32 writes them, batching, sampling, weight reloads. Does not know: clients,
caches, training. Importing it loads neither torch nor transformers; ``load_model``, ``create_app`` and ``serve`` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from topkd.serve.config import ServeConfig
from topkd.serve.process import ServerProcess

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["ServeConfig", "ServerProcess", "create_app", "load_model", "serve"]


def load_model(config: ServeConfig) -> tuple[Any, Any]:
    """The model of ``config`` in evaluation mode on its device, and its tokenizer."""
    from topkd.serve.model.loading import load_model as load

    return load(config)


def create_app(model: Any, tokenizer: Any, config: ServeConfig) -> Starlette:
    """An ASGI application that serves ``model``. Its model thread starts with the first request, or at start-up."""
    from topkd.serve.app import create_app as create

    return create(model, tokenizer, config)


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM; prints one line with the URL when ready."""
    from topkd.serve.run import serve as run

    run(config)
