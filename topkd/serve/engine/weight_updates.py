"""Weight reloads and adapter changes, made in the model thread between two steps."""

from __future__ import annotations

from pathlib import Path

from topkd.serve.engine.served import Served
from topkd.serve.model.loading import reload_weights
from topkd.topk.errors import DataError


async def reload(served: Served, path: str, version: str | None = None) -> None:
    """Load the checkpoint at ``path`` and name it; sequences in progress continue with the new weights.

    Raises:
        ConfigError: The checkpoint does not fit; nothing has changed.
    """

    def work() -> None:
        reload_weights(served.model, path)
        served.engine.weights_changed()
        if version is not None:
            served.engine.version = version

    await served.engine.call(work)


async def load_adapter(served: Served, name: str, path: str) -> None:
    """Serve the LoRA folder at ``path`` as ``name``, in place of what had that name.

    Raises:
        DataError: No adapter lies there.
    """
    if not (Path(path) / "adapter_config.json").is_file():
        raise DataError(f"No adapter found for {path}")

    def work() -> None:
        served.engine.backbone.load_adapter(name, path)
        served.engine.weights_changed()

    await served.engine.call(work)
    served.adapters[name] = path


async def unload_adapter(served: Served, name: str) -> None:
    """Remove an adapter and abort the work that uses it."""
    del served.adapters[name]

    def work() -> None:
        served.engine.drop_adapter(name)
        served.engine.backbone.unload_adapter(name)

    await served.engine.call(work)
