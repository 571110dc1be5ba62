"""Serving in this process: a socket, uvicorn, one ready line, a clean end."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn

from topkd.serve.config import ServeConfig
from topkd.topk.errors import ConfigError

READY = "topkd serve: ready at "


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, line: str) -> None:
        super().__init__(config)
        self._line = line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            sys.stdout.write(self._line + "\n")
            sys.stdout.flush()


def serve(config: ServeConfig) -> None:
    """Load the model, listen, and serve until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: The address is taken, or the model cannot be loaded or served.
    """
    folder = Path(config.model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            "the folder holds no model", where=f"model={config.model}", expected="config.json, weights and a tokenizer"
        )
    listening = listen(config.host, config.port)
    # Imported after the cheap mistakes have been found: torch and transformers take seconds.
    from topkd.serve.app import create_app
    from topkd.serve.loading import load_model

    with contextlib.closing(listening):
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        model, tokenizer = load_model(config)
        app: Any = create_app(model, tokenizer, config)
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=3,
        )
        line = f"{READY}http://{shown}:{port} (model {config.name}, max_logprobs {config.max_logprobs})"
        with contextlib.suppress(KeyboardInterrupt):
            _Server(settings, line).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Bound before the model loads, so that a taken port fails at once."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(
            "cannot listen", where=f"{host}:{port}", got=str(error), hint="choose another --port (0 takes a free one)"
        ) from error
    return sock
