"""Settings of the embedded server."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

API_KEY_VARIABLE = "TOPKD_SERVE_API_KEY"
READY_LINE = "topkd serve: ready at "  # then the URL; what ServerProcess waits for


class ServeConfig(BaseModel):
    """Settings of a server: one model, one address, and limits.

    Attributes:
        model: A folder, or an id the local Hugging Face cache can resolve.
        served_model_name: The name clients use; ``model`` as it is written when None.
        port: 0 takes a free one.
        dialect: Whose native routes it has besides the OpenAI ones. "sglang" is written from SGLang's documents and
            source, not observed on a running one; it has no limit on K.
        max_logprobs: The largest K (vLLM's default is 20); -1 for the whole vocabulary.
        max_model_len: Prompt plus completion; None takes the model's own.
        api_key: When set, every route but /health, /ping, /version and /metrics wants ``Authorization: Bearer KEY``.
        logprobs_mode: What *generated* logprobs are of: the model's own distribution, or the one after temperature,
            penalties and truncation. Prompt logprobs are always the model's own.
        enable_lora: Whether adapters may be loaded at run time (needs peft).
        when_paused: What becomes of requests that come while the server is paused: they wait, as with vLLM 0.32, or are
            answered 503, as by vLLM 0.33.
        max_queue: Requests that may wait before new ones are answered 503.
        max_batch_tokens: Padded prompt tokens of one forward pass (a longer prompt goes alone).
        max_running: Sequences that generate at the same time.
        max_kv_tokens: Padded tokens of key-value cache all running sequences together may hold.
        max_body_bytes: Larger requests are answered 413.
        seed: Seeds the draws of requests that bring no seed of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    dialect: Literal["vllm", "sglang"] = "vllm"
    max_logprobs: int = Field(default=20, ge=-1)
    max_model_len: int | None = Field(default=None, ge=2)
    api_key: SecretStr | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"
    enable_lora: bool = True
    when_paused: Literal["wait", "refuse"] = "wait"
    max_queue: int = Field(default=256, ge=1)
    max_batch_tokens: int = Field(default=16384, ge=1)
    max_running: int = Field(default=128, ge=1)
    max_kv_tokens: int = Field(default=524_288, ge=1)
    max_body_bytes: int = Field(default=64 * 2**20, ge=1024)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _key_is_not_empty(self) -> ServeConfig:
        if self.api_key is not None and not self.api_key.get_secret_value():
            raise ValueError("api_key is empty: leave it out for an open server, or give a key")
        return self

    @property
    def name(self) -> str:
        """The model name clients send; a path that ends in dots names nothing, and the folder's own name does."""
        folder = Path(self.model)
        return self.served_model_name or (self.model if folder.name.strip(".") else folder.resolve().name)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def control_routes(self) -> bool:
        """Weight reloads and pauses are offered on loopback, or behind a key; never to anyone on a network."""
        return self.loopback or self.api_key is not None
