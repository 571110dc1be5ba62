"""The ASGI application: every route of one served model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from topkd import __version__
from topkd.serve.config import ServeConfig
from topkd.serve.engine.refusal import Refusal
from topkd.serve.engine.served import VLLM_DIALECT, Served
from topkd.serve.routes import generate, openai, sglang
from topkd.serve.routes.control import Control
from topkd.serve.routes.prompts import render_chat
from topkd.serve.routes.requests import DetokenizeBody, TokenizeBody, check_prompt_ids
from topkd.serve.routes.sglang_control import SglangControl
from topkd.serve.routes.wire import KeyGuard, detail, json_reply, list_routes, read


def create_app(model: Any, tokenizer: Any, config: ServeConfig) -> Starlette:
    """Create the ASGI application of ``model``; ``app.state.served`` holds its engine."""
    served = Served(model, tokenizer, config)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        served.engine.stop()

    if config.dialect == "sglang":
        native, control = sglang.list_sglang_routes(served), SglangControl(served).routes()
    else:
        native, control = generate.list_generate_routes(served), Control(served).routes()
    routes = [*_information(served), *openai.list_openai_routes(served), *native]
    if config.control_routes:
        routes += control
    middleware = [] if config.api_key is None else [Middleware(KeyGuard, key=config.api_key.get_secret_value())]
    app = Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={HTTPException: detail})
    app.state.served = served
    return app


def _information(served: Served) -> list[Route]:
    async def healthy(_: Request) -> Response:
        return Response()

    async def version(_: Request) -> Response:
        # A local version of the dialect's release: clients that compare versions see 0.32.0, people see what it is.
        return json_reply({"version": f"{VLLM_DIALECT}+topkd.{__version__}"})

    async def models(_: Request) -> Response:
        return json_reply(served.cards())

    async def load(_: Request) -> Response:
        return json_reply({"server_load": sum(served.engine.load)})

    async def metrics(_: Request) -> Response:
        running, waiting = served.engine.load
        labels = f'{{engine="0",model_name="{served.config.name}"}}'
        values = {
            "vllm:num_requests_running": ("gauge", running),
            "vllm:num_requests_waiting": ("gauge", waiting),
            "vllm:prompt_tokens_total": ("counter", served.engine.prompt_tokens),
            "vllm:generation_tokens_total": ("counter", served.engine.drawn_tokens),
        }
        lines = [f"# TYPE {name} {kind}\n{name}{labels} {float(value)}\n" for name, (kind, value) in values.items()]
        return Response("".join(lines), media_type="text/plain; version=0.0.4")

    async def tokenize(request: Request) -> Response:
        body = await read(request, TokenizeBody, served.config.max_body_bytes)
        served.adapter_of(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Refusal("Give either prompt or messages", param="prompt")
        if body.prompt is not None:
            ids = served.words.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        else:
            text = render_chat(served, body, body.messages or [])
            ids = served.words.encode(text, add_special_tokens=bool(body.add_special_tokens))
        strings = served.words.pieces(ids) if body.return_token_strs else None
        return json_reply({"count": len(ids), "max_model_len": served.context, "tokens": ids, "token_strs": strings})

    async def detokenize(request: Request) -> Response:
        body = await read(request, DetokenizeBody, served.config.max_body_bytes)
        served.adapter_of(body.model)
        return json_reply({"prompt": served.words.decode(list(check_prompt_ids(body.tokens, served.vocab)))})

    gets = {"/v1/models": models, "/load": load, "/metrics": metrics}
    if served.config.dialect == "vllm":
        gets["/version"] = version
    return [
        *list_routes({"/health": healthy, "/ping": healthy}, "GET", "POST"),
        *list_routes(gets, "GET"),
        *list_routes({"/tokenize": tokenize, "/detokenize": detokenize}, "POST"),
    ]
