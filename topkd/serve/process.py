"""The server as a child process that ends with its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from topkd.serve.config import API_KEY_VARIABLE, READY_LINE, ServeConfig
from topkd.topk.errors import ServerError, ServerTimeoutError

LOG_LINES = 15


class ServerProcess:
    """Starts ``python -m topkd.serve`` and waits until it is healthy.

    ::

        with ServerProcess(ServeConfig(model="models/teacher", port=0)) as server:
            print(server.url)

    The child watches a pipe that closes when this process dies, however it dies. The API key travels by environment.

    Attributes:
        url: Where it listens, once started.
        log_path: Its output; a temporary file when none was given, removed after a clean stop.

    Raises:
        ServerError: The child died while starting; the message ends with the last lines of its log.
        ServerTimeoutError: It was not healthy in time.
    """

    def __init__(
        self, config: ServeConfig, *, log_path: str | Path | None = None, startup_timeout_s: float = 120
    ) -> None:
        self.config, self.startup_timeout_s = config, startup_timeout_s
        self.log_path = Path(log_path) if log_path is not None else None
        self._own_log = log_path is None
        self._child: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        """Process id of the child."""
        if self._child is None:
            raise ServerError("the embedded server is not running", hint="use it as a context manager, or call start()")
        return self._child.pid

    def start(self) -> Self:
        """Start the child and wait for /health."""
        if self.log_path is None:
            handle, name = tempfile.mkstemp(prefix="topkd-serve-", suffix=".log")
            os.close(handle)
            self.log_path = Path(name)
        environment = dict(os.environ)
        environment.pop(API_KEY_VARIABLE, None)
        if self.config.api_key is not None:
            environment[API_KEY_VARIABLE] = self.config.api_key.get_secret_value()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
                self.command(), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def command(self) -> list[str]:
        """Return the child's command line; it holds no secret."""
        options = self.config.model_dump(exclude={"model", "api_key", "enable_lora"}, exclude_none=True)
        flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        flags.append("--enable-lora" if self.config.enable_lora else "--no-enable-lora")
        return [sys.executable, "-m", "topkd.serve", *flags, "--watch-stdin", "--", self.config.model]

    def stop(self) -> None:
        """End the child, if it is running."""
        self._end()
        if self._own_log and self.log_path is not None:
            self.log_path.unlink(missing_ok=True)
            self.log_path = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.stdin is not None:
            child.stdin.close()
        child.terminate()
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _wait(self) -> None:
        child = self._child
        assert child is not None  # noqa: S101 - set by start, for the type checker
        deadline, where = time.monotonic() + self.startup_timeout_s, f"model={self.config.model}"
        while True:
            if child.poll() is not None:
                where += f", exit status {child.returncode}"
                raise ServerError("the embedded server died while starting", where=where, got=self._tail())
            if not self.url:
                self.url = self._listening_at()
            if self.url and _healthy(self.url):
                return
            if time.monotonic() > deadline:
                what = f"the embedded server was not ready after {self.startup_timeout_s:g} s"
                raise ServerTimeoutError(what, where=where, got=self._tail())
            time.sleep(0.05)

    def _text(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path is not None else ""

    def _listening_at(self) -> str:
        for line in self._text().splitlines():
            if line.startswith(READY_LINE):
                return line.removeprefix(READY_LINE).split(" ")[0]
        return ""

    def _tail(self) -> str:
        lines = [line for line in self._text().splitlines() if line.strip()]
        return " | ".join(lines[-LOG_LINES:]) or "an empty log"


def _healthy(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of this loopback
    try:
        with opener.open(f"{url}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
