"""The served model: engine, vocabulary, names that clients use, limits, and changes of its weights."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from topkd import __version__
from topkd.serve.config import ServeConfig
from topkd.serve.engine.engine import Engine
from topkd.serve.engine.refusal import unknown_model
from topkd.serve.engine.texts import Endings, Vocabulary
from topkd.serve.model.backbone import Backbone
from topkd.serve.model.loading import reload_weights
from topkd.topk.errors import ConfigError, DataError

P = ParamSpec("P")
T = TypeVar("T")
# The dialect this server speaks; clients choose between request schemas by it.
VLLM_DIALECT = "0.32.0"


class Served:
    """One model and what the routes need of it."""

    def __init__(self, model: Any, tokenizer: Any, config: ServeConfig) -> None:
        self.config = config
        self.name, self.folder = config.name, config.model  # SGLang names a reloaded model by its folder
        self.model = model
        self.words = Vocabulary(tokenizer)
        backbone = Backbone(model)
        self.vocab = backbone.vocab
        self.context = _context(model, config)
        self.endings = Endings(tokenizer, model, holds_back=config.dialect != "sglang")
        self.engine = Engine(backbone, self.endings, config, self.context)
        self.adapters: dict[str, str] = {}  # name -> folder
        # One thread writes the replies: several would only wait for one another, at five times the CPU time.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="topkd-serve-replies")
        self.started = int(time.time())
        self.fingerprint = f"topkd-{__version__}-{uuid.uuid4().hex[:8]}"

    async def write(self, build: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Build a reply in the replies' thread, so that the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, partial(build, *args, **options))

    def adapter_of(self, model: str | None) -> str | None:
        """Return the adapter that a request's ``model`` names; None is the base model.

        Raises:
            Refusal: No model of that name (404).
        """
        if model is None or model == self.name:
            return None
        if model in self.adapters:
            return model
        raise unknown_model(model, [self.name, *self.adapters])

    async def reload_weights(self, path: str, version: str | None = None) -> None:
        """Load the checkpoint at ``path`` and name it; sequences in progress continue with the new weights.

        Raises:
            ConfigError: The checkpoint does not fit; nothing has changed.
        """

        def work() -> None:
            reload_weights(self.model, path)
            self.engine.weights_changed()
            if version is not None:
                self.engine.version = version

        await self.engine.call(work)

    async def load_adapter(self, name: str, path: str) -> None:
        """Serve the LoRA folder at ``path`` as ``name``, in place of what had that name.

        Raises:
            DataError: No adapter lies there.
        """
        if not (Path(path) / "adapter_config.json").is_file():
            raise DataError(f"No adapter found for {path}")

        def work() -> None:
            self.engine.backbone.load_adapter(name, path)
            self.engine.weights_changed()

        await self.engine.call(work)
        self.adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        """Remove an adapter and abort the work that uses it."""
        del self.adapters[name]

        def work() -> None:
            self.engine.drop_adapter(name)
            self.engine.backbone.unload_adapter(name)

        await self.engine.call(work)

    def envelope(self, prefix: str, kind: str, model: str | None) -> dict[str, Any]:
        """Return the fields that every OpenAI reply begins with."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex[:16]}",
            "object": kind,
            "created": int(time.time()),
            "model": model or self.name,
            "service_tier": None,
            "system_fingerprint": self.fingerprint,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def cards(self) -> dict[str, Any]:
        """Return the body of ``/v1/models``."""
        base = self._card(self.name, root=self.folder, parent=None, context=self.context)
        adapters = [self._card(name, root=path, parent=self.name, context=None) for name, path in self.adapters.items()]
        return {"object": "list", "data": [base, *adapters]}

    def _card(self, name: str, *, root: str, parent: str | None, context: int | None) -> dict[str, Any]:
        permission = {
            "id": f"modelperm-{uuid.uuid4().hex[:16]}",
            "object": "model_permission",
            "created": self.started,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "topkd",
            "root": root,
            "parent": parent,
            "max_model_len": context,
            "permission": [permission],
        }


def _context(model: Any, config: ServeConfig) -> int:
    text = model.config.get_text_config()
    own = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    wanted = config.max_model_len
    if wanted is None:
        return int(own or 4096)
    if own and wanted > own:
        raise ConfigError("max_model_len is more than the model can attend to", got=wanted, expected=f"at most {own}")
    return wanted
