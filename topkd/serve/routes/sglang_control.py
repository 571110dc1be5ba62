"""SGLang's control routes, as SGLang 0.5.23 was seen to answer them."""

from __future__ import annotations

from typing import TypeVar

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
B = TypeVar("B", bound=BaseModel)
MODES: dict[str, PauseMode] = {"abort": "abort", "retract": "keep", "in_place": "keep"}


class DiskBody(BaseModel):
    """``/update_weights_from_disk``."""

    model_path: str
    weight_version: str | None = None


class PauseBody(BaseModel):
    """``/pause_generation``."""

    mode: str = "abort"


class ResumeBody(BaseModel):
    """``/continue_generation``: an object, whatever is in it."""


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
        routes = [Route(path, answer_flatly(handler), methods=["POST"]) for path, handler in posts.items()]
        return [*routes, Route("/flush_cache", answer_flatly(self.flush), methods=["GET"])]

    async def from_disk(self, request: Request) -> Response:
        """Load new weights, and name them when a name is given; the model is then called by its folder."""
        body = await read(request, DiskBody, self._limit)
        try:
            await self._served.reload_weights(body.model_path, body.weight_version)
        except TopkdError as error:
            return json_reply({"success": False, "message": f"Failed to update weights: {error}"}, 400)
        self._served.name = self._served.folder = body.model_path
        message = "Succeeded to update model weights."
        if body.weight_version is not None:
            message += f" Weight version updated to {body.weight_version}."
        return json_reply({"success": True, "message": message, "num_paused_requests": 0})

    async def pause(self, request: Request) -> Response:
        """Hold back new work."""
        body = await self._read_required(request, PauseBody)
        if body.mode not in MODES:
            raise Refusal(f"Unknown pause mode {body.mode!r}: expected one of {', '.join(MODES)}.")
        await self._served.engine.pause(MODES[body.mode])
        return json_reply({"status": "ok", "message": "Generation paused successfully."})

    async def resume(self, request: Request) -> Response:
        """Resume after a pause; without a body, which SGLang wants, nothing resumes."""
        await self._read_required(request, ResumeBody)
        self._served.engine.resume()
        return json_reply({"status": "ok", "message": "Generation continued successfully."})

    async def _read_required(self, request: Request, kind: type[B]) -> B:
        if not (await request.body()).strip():
            missing = "{'type': 'missing', 'loc': ('body',), 'msg': 'Field required', 'input': None}"
            raise Refusal(f"1 validation error:\n  {missing}\n    POST {request.url.path}")
        return await read(request, kind, self._limit)

    async def flush(self, _: Request) -> Response:
        """Do nothing: no cache outlives its request."""
        return Response("Cache flushed.\n")

    async def load(self, request: Request) -> Response:
        """Serve a LoRA folder under a name of its own."""
        body = await read(request, AdapterBody, self._limit)
        if not self._served.config.enable_lora:
            return self._answer_adapter("LoRA is not enabled. Please set `--enable-lora` to enable LoRA.")
        if not body.lora_name or body.lora_name == self._served.name:
            return self._answer_adapter(f"LoRA adapter {body.lora_name!r} cannot be loaded.")
        if body.lora_name in self._served.adapters:
            return self._answer_adapter(f"LoRA adapter {body.lora_name!r} is already loaded.")
        try:
            await self._served.load_adapter(body.lora_name, body.lora_path)
        except Exception as error:  # noqa: BLE001 - whatever peft says about the folder is the answer
            return self._answer_adapter(f"Failed to load LoRA adapter: {type(error).__name__}: {error}")
        return self._answer_adapter()

    async def unload(self, request: Request) -> Response:
        """Remove an adapter."""
        body = await read(request, AdapterBody, self._limit)
        if body.lora_name not in self._served.adapters:
            return self._answer_adapter(f"LoRA adapter {body.lora_name!r} is not loaded.")
        await self._served.unload_adapter(body.lora_name)
        return self._answer_adapter()

    def _answer_adapter(self, error: str | None = None) -> Response:
        adapters = dict(self._served.adapters) if error is None else None
        body = {"rid": None, "http_worker_ipc": None, "success": error is None, "error_message": error or ""}
        return json_reply({**body, "loaded_adapters": adapters}, 200 if error is None else 400)
