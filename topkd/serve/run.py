"""Serving in this process: a socket, uvicorn, one ready line, an orderly shutdown."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from topkd.serve.config import READY_LINE, ServeConfig
from topkd.topk.errors import ConfigError

BACKLOG = 2048  # uvicorn's own
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class _Server(uvicorn.Server):
    """A uvicorn server that prints its address once it listens."""

    def __init__(self, config: uvicorn.Config, line: str) -> None:
        super().__init__(config)
        self._line = line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            sys.stdout.write(self._line + "\n")
            sys.stdout.flush()


def serve(config: ServeConfig) -> None:
    """Load the model and serve it until Ctrl-C or SIGTERM; both return after requests in progress have ended.

    Raises:
        ConfigError: The address is taken, or the model cannot be loaded or served.
    """
    _check_model_path(config.model)
    listening = listen(config.host, config.port)
    # Imported after the cheap mistakes have been found: torch and transformers take seconds.
    from topkd.serve.app import create_app
    from topkd.serve.model.loading import load_model

    with contextlib.closing(listening):
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        model, tokenizer = load_model(config)
        app: Any = create_app(model, tokenizer, config)
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
        settings = uvicorn.Config(app, **quiet, timeout_keep_alive=75, timeout_graceful_shutdown=3)
        try:  # a port that was bound is not yet ours while another process that bound it, too, may listen
            listening.listen(BACKLOG)
        except OSError as error:
            raise _make_listen_error(config.host, config.port, error) from error
        line = f"{READY_LINE}http://{shown}:{port} (model {config.name}, max_logprobs {config.max_logprobs})"
        with contextlib.suppress(KeyboardInterrupt), _interrupt_on_sigterm():
            _Server(settings, line).run(sockets=[listening])


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt: uvicorn shuts down on either signal and then raises it again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _check_model_path(model: str) -> None:
    """Refuse a path that is not a model, before torch and transformers are imported."""
    folder, where, expected = Path(model), f"model={model}", "config.json, weights and a tokenizer"
    try:
        if folder.is_dir():
            if not _names_a_model(folder / "config.json"):
                trained = folder / "student"  # in the folder of a run, whose own config.json is another
                hint = f"did you mean {trained}?" if _names_a_model(trained / "config.json") else ""
                raise ConfigError("the folder holds no model", where=where, expected=expected, hint=hint)
        elif folder.exists():
            raise ConfigError("the model path is a file", where=where, expected=f"a folder with {expected}")
        elif not _HUB_ID.fullmatch(model):
            raise ConfigError("no such folder", where=where, expected=f"a folder with {expected}")
        elif not _is_cached(model):
            if "/" in model:  # far more often a mistyped path than an id that nobody has fetched yet
                raise ConfigError(
                    "no such folder", where=where,
                    expected=f"a folder with {expected}, or an id that is in the local Hugging Face cache",
                )  # fmt: skip
            hint = f"hf download {model} brings an id there"
            raise ConfigError("no such folder, nor such an id in the local Hugging Face cache", where=where, hint=hint)
    except OSError as error:
        raise ConfigError("the model's folder cannot be read", where=where, got=str(error)) from error


def _names_a_model(config: Path) -> bool:
    """Whether the file is a model's config; one that cannot be read is left to the loader."""
    if not config.is_file():
        return False
    try:
        return not {"model_type", "architectures", "auto_map"}.isdisjoint(json.loads(config.read_bytes()))
    except (ValueError, TypeError):
        return True


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket (port 0 takes a free one) before the model loads, so that a taken port fails at once."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, UnicodeError) as error:
        raise _make_listen_error(host, port, error) from error
    return sock


def _make_listen_error(host: str, port: int, error: OSError | UnicodeError) -> ConfigError:
    number = getattr(error, "errno", None)
    no_such_address = isinstance(error, UnicodeError | socket.gaierror) or number == errno.EADDRNOTAVAIL
    return ConfigError(
        "cannot listen",
        where=f"{host}:{port}",
        got=str(error),
        hint="--host takes an address or a name of this machine, as 127.0.0.1 or 0.0.0.0"
        if no_such_address
        else "choose another --port (0 takes a free one)",
    )
