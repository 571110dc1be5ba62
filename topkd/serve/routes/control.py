"""vLLM's control routes: weights, versions, pauses, adapters (vLLM mounts them in development mode)."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError, ValidatorFunctionWrapHandler, model_validator
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from topkd.serve.engine.engine import PauseMode
from topkd.serve.engine.refusal import Refusal, describe_malformed_query, restate_error, worker_failed
from topkd.serve.engine.served import Served
from topkd.serve.routes.wire import json_reply, list_routes, read
from topkd.topk.errors import DataError, TopkdError

NO_TRANSFER = "Weight transfer not configured. Please set weight_transfer_config to enable weight transfer."


class RpcBody(BaseModel):
    """``/collective_rpc``."""

    method: str
    kwargs: dict[str, Any] = {}


class VersionBody(BaseModel):
    """``/update_weight_version``."""

    new_version: str

    @model_validator(mode="wrap")
    @classmethod
    def _each_by_itself(cls, value: object, handler: ValidatorFunctionWrapHandler) -> VersionBody:
        # vLLM reads this body field by field: what it shows for one that is missing is None, not the whole body.
        try:
            return handler(value)  # type: ignore[no-any-return]
        except ValidationError as error:
            findings = [
                {**finding, "input": None if finding["type"] == "missing" else finding["input"]}
                for finding in error.errors(include_url=False)
            ]
            raise restate_error(error, findings) from error


class LoadAdapterBody(BaseModel):
    """``/v1/load_lora_adapter``."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterBody(BaseModel):
    """``/v1/unload_lora_adapter``."""

    lora_name: str


class Control:
    """Control routes; every change happens in the model thread, between two steps."""

    def __init__(self, served: Served) -> None:
        self._served, self._limit = served, served.config.max_body_bytes
        self._sleeping = False

    def routes(self) -> list[Route]:
        """List the routes."""
        posts = {
            "/collective_rpc": self.collective_rpc,
            "/reset_prefix_cache": self.reset_prefix_cache,
            "/update_weight_version": self.update_weight_version,
            "/pause": self.pause,
            "/resume": self.resume,
            "/sleep": self.sleep,
            "/wake_up": self.wake_up,
            "/v1/load_lora_adapter": self.load_adapter,
            "/v1/unload_lora_adapter": self.unload_adapter,
        }
        transfers = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
        posts |= {f"/{name}": self.no_transfer for name in transfers}
        gets = {"/weight_info": self.weight_info, "/is_paused": self.is_paused, "/is_sleeping": self.is_sleeping}
        return [*list_routes(posts, "POST"), *list_routes(gets, "GET")]

    async def collective_rpc(self, request: Request) -> Response:
        """Call a worker's method: ``reload_weights`` is the one there is."""
        body = await read(request, RpcBody, self._limit)
        if body.method != "reload_weights":
            raise worker_failed("collective_rpc", f"'Worker' object has no attribute '{body.method}'")
        path = body.kwargs.get("weights_path") or self._served.config.model
        try:
            await self._served.reload_weights(str(path))
        except TopkdError as error:
            raise worker_failed("collective_rpc", str(error)) from error
        return json_reply({"results": [None]})

    async def reset_prefix_cache(self, _: Request) -> Response:
        """Do nothing: no cache outlives its request, and a reload rebuilds running ones."""
        return json_reply({"success": True})

    async def update_weight_version(self, request: Request) -> Response:
        """Set the version of the weights; a reload alone does not."""
        body = await read(request, VersionBody, self._limit)

        def work() -> None:
            self._served.engine.version = body.new_version

        await self._served.engine.call(work)
        return json_reply({"success": True, "new_version": body.new_version})

    async def weight_info(self, _: Request) -> Response:
        """Return the version of the weights."""
        return json_reply({"weight_version": self._served.engine.version})

    async def pause(self, request: Request) -> Response:
        """Hold back new work; ``mode`` says what becomes of running work (default abort, as in vLLM)."""
        mode = request.query_params.get("mode", "abort")
        modes: tuple[PauseMode, ...] = get_args(PauseMode)
        if mode not in modes:
            raise describe_malformed_query("mode", mode, modes)
        await self._served.engine.pause(next(known for known in modes if known == mode))
        return json_reply({"status": "paused"})

    async def resume(self, _: Request) -> Response:
        """Resume; does nothing when not paused."""
        self._served.engine.resume()
        return json_reply({"status": "resumed"})

    async def is_paused(self, _: Request) -> Response:
        """Return whether work is held back."""
        return json_reply({"is_paused": self._served.engine.paused})

    async def sleep(self, request: Request) -> Response:
        """Pause and wait for running work; no memory is freed."""
        level = request.query_params.get("level", "1")
        if level not in {"0", "1", "2"}:
            raise Refusal(f"Invalid sleep level {level!r}: expected 0, 1 or 2", param="level")
        await self._served.engine.pause("wait")
        self._sleeping = True
        return json_reply({"status": "sleeping", "level": int(level)})

    async def wake_up(self, request: Request) -> Response:
        """End a sleep."""
        self._served.engine.resume()
        self._sleeping = False
        return json_reply({"status": "awake", "tags": request.query_params.getlist("tags") or None})

    async def is_sleeping(self, _: Request) -> Response:
        """Return whether the server sleeps."""
        return json_reply({"is_sleeping": self._sleeping})

    async def no_transfer(self, _: Request) -> Response:
        """Refuse weights over NCCL: this server reads them from disk."""
        raise worker_failed("collective_rpc", NO_TRANSFER)

    async def load_adapter(self, request: Request) -> Response:
        """Serve a LoRA folder under a name of its own."""
        body = await read(request, LoadAdapterBody, self._limit)
        name, served = body.lora_name, self._served
        if not served.config.enable_lora:
            raise worker_failed("add_lora", "LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if not name or name == served.config.name:
            raise Refusal(f"The lora adapter cannot be named '{name}'.", kind="InvalidUserInput")
        if name in served.adapters and not body.load_inplace:
            raise Refusal(
                f"The lora adapter '{name}' has already been loaded. "
                "If you want to load the adapter in place, set 'load_inplace' to True.",
                kind="InvalidUserInput",
            )
        try:
            await served.load_adapter(name, body.lora_path)
        except DataError as error:
            message = f"Loading lora {name} failed: {error}"
            raise Refusal(message, status=404, kind="NotFoundError") from error
        except Exception as error:
            raise worker_failed("add_lora", f"{type(error).__name__}: {error}") from error
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        """Remove an adapter and abort the work that uses it."""
        body = await read(request, UnloadAdapterBody, self._limit)
        name, served = body.lora_name, self._served
        if name not in served.adapters:
            raise Refusal(f"The lora adapter '{name}' cannot be found.", status=404, kind="NotFoundError")
        await served.unload_adapter(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")
