"""``python -m topkd.serve MODEL``: the server as a program of its own."""

from __future__ import annotations

import argparse
import os
import sys
import threading

from pydantic import ValidationError

from topkd.serve.config import API_KEY_VARIABLE, ServeConfig
from topkd.topk.errors import ConfigError, TopkdError


def run_server_process(argv: list[str] | None = None) -> int:
    """Serve a model and return the exit code.

    0: Ctrl-C or SIGTERM ended a server that was ready. 2: a bad option or a model that cannot be served. 130: Ctrl-C
    while the model was loading.
    """
    options = vars(_parser().parse_args(argv))
    if options.pop("watch_stdin"):
        threading.Thread(target=_end_with_parent, name="topkd-serve-parent", daemon=True).start()
    named = options.pop("api_key_env")
    key = os.environ.pop(named or API_KEY_VARIABLE, None)
    try:
        if named and not key:  # an open server is not what was asked for
            raise ConfigError(f"the environment variable {named} (--api-key-env) is not set")
        config = _config(options, key)
        from topkd.serve.run import serve

        # This program's output is a log, from the first import on: no progress bars, no reports.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        serve(config)
    except TopkdError as error:
        sys.stderr.write(f"topkd serve: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:  # only while the model loads: serve() returns once the server is ready
        sys.stderr.write("topkd serve: stopped\n")
        return 130
    return 0


def _config(options: dict[str, object], key: str | None) -> ServeConfig:
    values = {name: value for name, value in options.items() if value is not None}
    try:
        return ServeConfig.model_validate({**values, **({"api_key": key} if key else {})})
    except ValidationError as error:
        finding = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, finding["loc"]))
        raise ConfigError(f"bad option: {finding['msg']}", where=where) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m topkd.serve", description="Serve a causal LM in vLLM's dialects.")
    parser.add_argument("model", help="folder or id of a Hugging Face causal LM")
    for name, field in ServeConfig.model_fields.items():
        if name not in {"model", "api_key", "enable_lora"}:
            kind = int if field.annotation in (int, int | None) else str
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument("--enable-lora", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--api-key-env", help=f"variable that holds the API key; {API_KEY_VARIABLE} is read if set")
    parser.add_argument("--watch-stdin", action="store_true", help="end when standard input closes")
    return parser


def _end_with_parent() -> None:
    """End this process when standard input closes: SIGKILL of the parent leaves no orphan."""
    # os.read, not sys.stdin: a buffered reader held by a daemon thread aborts the interpreter's own clean end.
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(run_server_process())
