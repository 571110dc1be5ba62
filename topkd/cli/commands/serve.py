"""``topkd serve``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from topkd.cli.options import ApiKeyEnv, option, require_extra
from topkd.compose.config.api_keys import read_api_key


def serve_command(
    model: Annotated[
        str, typer.Argument(help="Model folder, or a Hugging Face id that is in the local cache.", metavar="MODEL")
    ],
    host: Annotated[str, option("Address to listen on.", "ADDRESS")] = "127.0.0.1",
    port: Annotated[int, option("Port; 0 takes a free one.", "N", min=0, max=65535)] = 8000,
    served_model_name: Annotated[str | None, option("Model name that clients send; default: MODEL.", "NAME")] = None,
    api_key_env: ApiKeyEnv = None,
    max_logprobs: Annotated[int, option("Largest K that clients may ask for; -1: no limit.", "K", min=-1)] = 20,
    max_model_len: Annotated[int | None, option("Context length; default: that of the model.", "N", min=2)] = None,
    dialect: Annotated[
        str,
        option("Native API in addition to the OpenAI one: vllm or sglang.", "NAME", one_of=("vllm", "sglang")),
    ] = "vllm",
    dtype: Annotated[
        str,
        option("float32, bfloat16, float16 or auto.", "TYPE", one_of=("float32", "bfloat16", "float16", "auto")),
    ] = "float32",
    device: Annotated[str, option("auto, cpu, cuda or mps.", "NAME", one_of=("auto", "cpu", "cuda", "mps"))] = "auto",
) -> None:
    """Serve a Hugging Face causal LM with the API of vLLM or SGLang, for tests and small models.

    Ctrl-C and SIGTERM end the server after the requests in progress, with exit code 0.

    Example: topkd serve ./models/teacher --port 8011 --max-logprobs 64
    """
    require_extra("serve", "torch", "transformers", "starlette", "uvicorn", extra="serve")
    from topkd.compose.config.run_config import validate_config
    from topkd.serve import ServeConfig, serve

    values: dict[str, Any] = {
        "model": model,
        "host": host,
        "port": port,
        "served_model_name": served_model_name,
        "api_key": read_api_key(api_key_env, source="--api-key-env"),
        "max_logprobs": max_logprobs,
        "max_model_len": max_model_len,
        "dialect": dialect,
        "dtype": dtype,
        "device": device,
    }
    serve(validate_config(ServeConfig, values, where="topkd serve"))
