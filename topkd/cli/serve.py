"""``topkd serve``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from topkd.cli.extras import needs
from topkd.compose.api_keys import api_key


def command(
    model: Annotated[str, typer.Argument(help="Model folder, or a Hugging Face id that is in the local cache.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="Name that clients use.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the API key.")] = None,
    max_logprobs: Annotated[int, typer.Option(min=-1, help="Largest K; -1 for the whole vocabulary.")] = 20,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Context; the model's own when left out.")] = None,
    dialect: Annotated[str, typer.Option(help="Native routes beside the OpenAI ones: vllm or sglang.")] = "vllm",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Put a Hugging Face causal LM behind vLLM's dialects, or SGLang's.

    Example: topkd serve ./models/teacher --port 8011 --max-logprobs 64
    """
    needs("serve", "torch", "transformers", "starlette", "uvicorn", extra="serve")
    from topkd.compose.config import validated
    from topkd.serve import ServeConfig, serve

    values: dict[str, Any] = {
        "model": model,
        "host": host,
        "port": port,
        "served_model_name": served_model_name,
        "api_key": api_key(api_key_env, said="--api-key-env"),
        "max_logprobs": max_logprobs,
        "max_model_len": max_model_len,
        "dialect": dialect,
        "dtype": dtype,
        "device": device,
    }
    serve(validated(ServeConfig, values, where="topkd serve"))
