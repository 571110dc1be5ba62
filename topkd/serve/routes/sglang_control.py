"""SGLang's control routes, written from its documents."""

from __future__ import annotations

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from topkd.serve.engine.engine import PauseMode
from topkd.serve.engine.refusal import Refusal
from topkd.serve.engine.served import Served
from topkd.serve.routes.sglang import answer_flatly
from topkd.serve.routes.wire import json_reply, read
from topkd.topk.errors import TopkdError

# A retracted request goes back to the queue and is computed again; a frozen one is here rebuilt after a reload as well.
MODES: dict[str, PauseMode] = {"abort": "abort", "retract": "keep", "in_place": "keep"}


class DiskBody(BaseModel):
    """``/update_weights_from_disk``."""

    model_path: str
    weight_version: str | None = None


class PauseBody(BaseModel):
    """``/pause_generation``."""

    mode: str = "abort"


class AdapterBody(BaseModel):
    """``/load_lora_adapter`` and ``/unload_lora_adapter``."""

    lora_name: str
    lora_path: str = ""


class SglangControl:
    """Control routes: weights from disk, pauses, adapters."""

    def __init__(self, served: Served) -> None:
        self._served, self._limit = served, served.config.max_body_bytes

    def routes(self) -> list[Route]:
        """List the routes."""
        posts = {
            "/update_weights_from_disk": self.from_disk,
            "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/flush_cache": self.flush,
            "/load_lora_adapter": self.load,
            "/unload_lora_adapter": self.unload,
        }
        return [Route(path, answer_flatly(handler), methods=["POST"]) for path, handler in posts.items()]

    async def from_disk(self, request: Request) -> Response:
        """Load new weights, and name them when a name is given."""
        body = await read(request, DiskBody, self._limit)
        try:
            await self._served.reload_weights(body.model_path, body.weight_version)
        except TopkdError as error:
            return _outcome(f"Failed to update weights: {error}", success=False)
        return _outcome("Succeeded to update model weights.")

    async def pause(self, request: Request) -> Response:
        """Hold back new work."""
        body = await read(request, PauseBody, self._limit)
        if body.mode not in MODES:
            raise Refusal(f"Unknown pause mode {body.mode!r}: expected one of {', '.join(MODES)}.")
        await self._served.engine.pause(MODES[body.mode])
        return json_reply({"status": "ok", "message": "Generation paused successfully."})

    async def resume(self, _: Request) -> Response:
        """Resume after a pause."""
        self._served.engine.resume()
        return json_reply({"status": "ok", "message": "Generation continued successfully."})

    async def flush(self, _: Request) -> Response:
        """Do nothing: no cache outlives its request."""
        return Response("Cache flushed.\n")

    async def load(self, request: Request) -> Response:
        """Serve a LoRA folder under a name of its own."""
        body = await read(request, AdapterBody, self._limit)
        if not self._served.config.enable_lora or not body.lora_name or body.lora_name == self._served.config.name:
            return _outcome(f"LoRA adapter {body.lora_name!r} cannot be loaded.", success=False)
        if body.lora_name in self._served.adapters:
            return _outcome(f"LoRA adapter {body.lora_name!r} is already loaded.", success=False)
        try:
            await self._served.load_adapter(body.lora_name, body.lora_path)
        except Exception as error:  # noqa: BLE001 - whatever peft says about the folder is the answer
            return _outcome(f"Failed to load LoRA adapter: {type(error).__name__}: {error}", success=False)
        return _outcome("", adapters=self._served.adapters)

    async def unload(self, request: Request) -> Response:
        """Remove an adapter."""
        body = await read(request, AdapterBody, self._limit)
        if body.lora_name not in self._served.adapters:
            return _outcome(f"LoRA adapter {body.lora_name!r} is not loaded.", success=False)
        await self._served.unload_adapter(body.lora_name)
        return _outcome("", adapters=self._served.adapters)


def _outcome(message: str, *, success: bool = True, adapters: dict[str, str] | None = None) -> Response:
    body: dict[str, object] = {"success": success, "message": message}
    if adapters is not None:
        body["loaded_adapters"] = adapters
    return json_reply(body, 200 if success else 400)
