"""Weight sinks bring new student weights to the server that samples; every push is confirmed or an error.

Full weights: check the folder -> pause -> reload -> cache reset confirmed -> version set and read back -> resume, in
``finally`` -> one generated token. Adapters: a new versioned name a push, because a server may keep stale cache entries
for a name that is loaded again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Unpack

import msgspec

from topkd.clients.decoding.vllm import typed
from topkd.clients.dialects.base import ClientOptions, HttpClient
from topkd.clients.http.endpoint import RequestInfo
from topkd.topk.errors import ConfigError, RequestRefusedError, ResponseError, ServerError, SyncError, TopkdError
from topkd.topk.protocols import Version, WeightUpdate

_OBJECT: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])
_RESET_TRIES = 20
_RESET_PAUSE_S = 0.25
_HEADER_LIMIT = 100 * 2**20  # safetensors' own bound

Shapes = dict[str, tuple[str, tuple[int, ...]]]


class HttpSink(HttpClient):
    """Base of the weight sinks over HTTP: calls are sent once, and a SyncError states what state is left.

    Attributes:
        routes: What a server must have mounted to take an update, by its kind.
    """

    routes: ClassVar[dict[str, tuple[str, ...]]]
    _info: ClassVar[str] = "/weight_info"

    def __init__(
        self,
        base_url: str,
        *,
        reference: str | None = None,
        keep_adapters: int = 2,
        **options: Unpack[ClientOptions],
    ) -> None:
        super().__init__(base_url, **options)
        if keep_adapters < 1:
            raise ConfigError("keep_adapters must be at least 1", got=keep_adapters)
        self._reference: Shapes | None = check_folder(reference, "full") if reference else None
        self._adapters: deque[str] = deque()
        self._keep = keep_adapters
        self._pushing = asyncio.Lock()
        self.version: Version = ""
        self.sampling_model: str | None = None

    async def push(self, update: WeightUpdate) -> Version:
        """Bring the weights to the server; return the version that the *server* confirms. One push at a time."""
        if not update.version:
            raise ConfigError("a weight update needs a version")
        async with self._pushing:
            update = replace(update, path=await asyncio.to_thread(_absolute, update.path))
            shapes = await asyncio.to_thread(check_folder, update.path, update.kind)
            if update.kind == "full" and self._reference is not None:
                check_same_shapes(shapes, self._reference, update.path)
            if update.kind == "full":
                confirmed = await self._reload(update)
                if confirmed != update.version:
                    where = self.where(f"version {update.version}")
                    raise SyncError("the server reports another weight version", where=where, got=confirmed)
                self.sampling_model = await self.model_name()
                await self._generates(self.sampling_model)
                self._reference = shapes
            else:
                await self._adapter(update)
            self.version = update.version
            self.metrics_.add("pushes")
            return update.version

    async def weight_version(self) -> Version:
        """Ask what the server calls the weights it holds; "" where it states nothing."""
        try:
            return str((await self._get(self._info)).get("weight_version") or "")
        except (RequestRefusedError, ResponseError):
            return ""

    async def unload(self) -> None:
        """Unload every adapter that was pushed: nothing will be sampled from them any more."""
        while self._adapters:
            with contextlib.suppress(ServerError, ResponseError):
                await self._unload_adapter({"lora_name": self._adapters.popleft()})

    async def _reload(self, update: WeightUpdate) -> object:
        """Load full weights; return the version that the server then states."""
        raise ConfigError("this server takes no full weights", where=self.endpoint.url, got=update.path)

    async def _adapter(self, update: WeightUpdate) -> None:
        """Load under a name of its own, see it served, then unload the oldest beyond ``keep_adapters``."""
        name = f"{await self.model_name()}@{update.version}"
        where = self.where(f"adapter {name}")
        body = {"lora_name": name, "lora_path": update.path}
        try:
            await self._load_adapter(body)
            served = name in await self._adapter_names()
        except TopkdError as error:
            raise SyncError(
                "the adapter was not loaded", where=where, got=error, hint="older ones still serve"
            ) from error
        if not served:
            raise SyncError("the server took the adapter but does not list it", where=where)
        await self._generates(name)
        self.sampling_model = name
        self._adapters.append(name)
        while len(self._adapters) > self._keep:
            oldest = self._adapters.popleft()
            with contextlib.suppress(ServerError, ResponseError):  # an adapter too many harms nobody
                await self._unload_adapter({"lora_name": oldest})

    async def _load_adapter(self, body: dict[str, str]) -> None:
        await self._post("/v1/load_lora_adapter", body, plain=True)

    async def _unload_adapter(self, body: dict[str, str]) -> None:
        await self._post("/v1/unload_lora_adapter", body, plain=True)

    async def _adapter_names(self) -> list[str]:
        return [card.id for card in await self._cards()]

    async def _generates(self, model: str) -> None:
        """Generate one token: a prompt score alone can look right on a server whose generation is broken."""
        body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0.0}
        try:
            await self._post("/v1/completions", body)
        except TopkdError as error:
            raise SyncError("the server does not generate after the update", where=self.where(), got=error) from error

    async def _post(self, path: str, body: object = None, *, plain: bool = False) -> dict[str, Any]:
        def decode(reply: bytes) -> dict[str, Any]:
            return {} if plain else typed(reply, _OBJECT)

        return await self.endpoint.call(
            "POST", path, body, decode=decode, where=self.where(path), asks=RequestInfo(single_try=True)
        )

    async def _get(self, path: str) -> dict[str, Any]:
        return await self.endpoint.call("GET", path, decode=lambda reply: typed(reply, _OBJECT), where=self.where(path))

    @contextlib.asynccontextmanager
    async def _paused(
        self, pause: str, resume: str, body: object = None, resume_body: object = None
    ) -> AsyncIterator[None]:
        """Pause the server, and resume it whatever happens, a cancellation and a lost reply included."""
        try:
            await self._post(pause, body)
        except BaseException as error:
            if not isinstance(error, RequestRefusedError):  # it may have paused before its reply was lost
                with contextlib.suppress(TopkdError):
                    await asyncio.shield(self._post(resume, resume_body))
            if not isinstance(error, TopkdError):
                raise
            raise SyncError(
                "the server cannot be paused, so no weights were sent", where=self.where(pause), got=error,
                hint="vLLM needs VLLM_SERVER_DEV_MODE=1 for weight updates",
            ) from error  # fmt: skip
        try:
            yield
        finally:
            try:
                await asyncio.shield(self._post(resume, resume_body))
            except TopkdError as error:
                raise SyncError("the server is left paused", where=self.where(resume), got=error) from error


class VllmWeightSink(HttpSink):
    """Weights to vLLM (and to ``topkd serve``): versioned LoRA adapters, or a full reload from a folder it can read.

    Args:
        base_url: ``http(s)://host:port``.
        reference: Folder of the checkpoint the server runs now; a push with other tensors is then refused untouched.
        keep_adapters: Adapters left loaded, so that requests under way with the last one finish.
        **options: As for every client; see ``ClientOptions``. ``model`` is the served name of the base model.

    ``sampling_model`` names what to sample from after a push. Full reloads need ``VLLM_SERVER_DEV_MODE=1`` there,
    adapters ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``.
    """

    routes: ClassVar = {
        "lora": ("/v1/load_lora_adapter",),
        "full": ("/pause", "/collective_rpc", "/weight_info"),
    }

    async def _reload(self, update: WeightUpdate) -> object:
        where = self.where(f"version {update.version}")
        body = {"method": "reload_weights", "kwargs": {"weights_path": update.path}}
        async with self._paused("/pause?mode=wait", "/resume"):
            try:
                await self._post("/collective_rpc", body)
                await self._reset_cache()
                await self._post("/update_weight_version", {"new_version": update.version})
                confirmed = (await self._get("/weight_info")).get("weight_version")
            except SyncError:
                raise
            except TopkdError as error:
                raise SyncError(
                    "the weight update failed half-way", where=where, got=error,
                    hint="the server may hold unusable weights: restart it before sampling",
                ) from error  # fmt: skip
        return confirmed

    async def _reset_cache(self) -> None:
        """Drop the old weights' key-value cache: prompt scores bypass it and would hide a stale one."""
        reply: dict[str, Any] = {}
        for _ in range(_RESET_TRIES):
            reply = await self._post("/reset_prefix_cache")
            if reply.get("success", True):
                return
            await asyncio.sleep(_RESET_PAUSE_S)  # blocks are held until the last request has gone
        raise SyncError(
            "the prefix cache was not reset: generation would mix old and new weights", where=self.where(), got=reply
        )


class SglangWeightSink(HttpSink):
    """Weights to SGLang: a reload from disk with the cache flushed, or versioned adapters. Met for real: 0.5.23 on CPU.

    After a reload the server calls its model by the folder's path; ``/generate`` names no model, so it does not matter.
    """

    routes: ClassVar = {
        "lora": ("/load_lora_adapter",),
        "full": ("/pause_generation", "/update_weights_from_disk"),
    }
    _info: ClassVar[str] = "/model_info"

    async def _reload(self, update: WeightUpdate) -> object:
        where = self.where(f"version {update.version}")
        await self.model_name()  # before the server is renamed
        body = {
            "model_path": update.path,
            "weight_version": update.version,
            "flush_cache": True,
        }
        # Since 0.5.6 both routes want a body; older ones read none.
        async with self._paused("/pause_generation", "/continue_generation", {"mode": "retract"}, {}):
            try:
                reply = await self._post("/update_weights_from_disk", body)
                confirmed = (await self._get("/model_info")).get("weight_version")
            except TopkdError as error:
                raise SyncError("the weight update failed half-way", where=where, got=error) from error
        if not reply.get("success"):
            raise SyncError("the server refused the weights", where=where, got=reply.get("message"))
        return confirmed

    async def _load_adapter(self, body: dict[str, str]) -> None:
        reply = await self._post("/load_lora_adapter", body)
        if not reply.get("success"):
            reason = reply.get("error_message") or reply.get("message")
            raise RequestRefusedError("the adapter was refused", where=self.where(), got=reason)

    async def _unload_adapter(self, body: dict[str, str]) -> None:
        await self._post("/unload_lora_adapter", body)

    async def _generates(self, model: str) -> None:
        """Generate one token over ``/generate``: ``/v1/completions`` answers any name from the base model."""
        body: dict[str, Any] = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
        if model != self._model:
            body["lora_path"] = model
        try:
            await self._post("/generate", body)
        except TopkdError as error:
            raise SyncError("the server does not generate after the update", where=self.where(), got=error) from error


def _absolute(path: str) -> str:
    return str(Path(path).resolve())


def check_folder(path: str, kind: Literal["full", "lora"]) -> Shapes:
    """Read every tensor's dtype and shape from the safetensors headers of a folder.

    Checked before a server is asked to load it: a failed reload can leave a server unusable.

    Raises:
        SyncError: a file is absent or incomplete.
    """
    folder = Path(path)
    config = folder / ("config.json" if kind == "full" else "adapter_config.json")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unusable(folder, f"{config.name}: {_reason(error)}") from error
    files = sorted(folder.glob("*.safetensors"))
    if kind == "lora":
        files = [file for file in files if file.name == "adapter_model.safetensors"]
    if not files:
        raise _unusable(folder, "no adapter_model.safetensors" if kind == "lora" else "no *.safetensors file")
    shapes: Shapes = {}
    for file in files:
        try:
            shapes |= _header(file)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise _unusable(folder, f"{file.name}: {_reason(error)}") from error
    return shapes


def check_same_shapes(shapes: Shapes, reference: Shapes, path: str) -> None:
    """Refuse a checkpoint that does not fit what the server holds: only a restart would mend that."""
    for name in sorted(set(shapes) | set(reference)):
        new, old = shapes.get(name), reference.get(name)
        if new is None or old is None or new[1] != old[1]:
            raise SyncError(
                "the checkpoint does not fit the model that is served",
                where=f"{path}, tensor {name}",
                got="absent" if new is None else new[1],
                expected="absent" if old is None else old[1],
                hint="the server was not touched",
            )


def _header(file: Path) -> Shapes:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _HEADER_LIMIT:
            raise ValueError("header too long")
        entries: dict[str, Any] = json.loads(stream.read(length))
    size = file.stat().st_size - 8 - length
    entries.pop("__metadata__", None)
    if max((entry["data_offsets"][1] for entry in entries.values()), default=0) != size:
        raise ValueError("the file is shorter or longer than its header says")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)[:120] or type(error).__name__


def _unusable(folder: Path, reason: str) -> SyncError:
    return SyncError(
        "not a checkpoint that a server could load", where=str(folder), got=reason, hint="the server was not touched"
    )
