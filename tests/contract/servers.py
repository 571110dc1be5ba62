"""Real servers as subprocesses: started once, watched while they start, killed with their process group."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from pydantic import SecretStr

ROOT = Path(__file__).resolve().parents[2]
VLLM_PYTHON = ROOT / os.environ.get("VLLM_VENV", ".venv-vllm") / "bin" / "python"
OLDER_VLLM_PYTHON = ROOT / ".venv-vllm-0.31" / "bin" / "python"
LLAMA_PYTHON = Path(os.environ.get("LLAMA_VENV", ROOT / ".venv-llama")) / "bin" / "python"
SHIMS = Path(__file__).parent / "shims"


@dataclass(frozen=True)
class Endpoint:
    """A running server, and what it was told when it was started."""

    kind: str  # "vllm" | "embedded"
    url: str
    model: str
    model_dir: Path
    max_logprobs: int
    max_model_len: int
    pid: int
    log: Path
    api_key: str | None = None

    @property
    def real(self) -> bool:
        return self.kind == "vllm"

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def kill(self) -> None:
        """SIGKILL to all of it: a vLLM leads a process group of its own, the embedded server is one process in ours."""
        if os.getpgid(self.pid) == self.pid:
            os.killpg(self.pid, signal.SIGKILL)
        else:
            os.kill(self.pid, signal.SIGKILL)

    def http(self, **options: object) -> httpx.Client:
        """A plain HTTP client: the suite that checks the servers must not depend on the clients under test."""
        return httpx.Client(
            **{
                "base_url": self.url,
                "headers": self.headers(),
                "timeout": 120.0,
                "trust_env": False,
                "verify": False,
                **options,
            }  # type: ignore[arg-type]
        )


@dataclass
class Process:
    """A child in its own process group, with its output in a file."""

    popen: subprocess.Popen[bytes]
    log: Path
    killed: bool = field(default=False)

    def kill(self, sig: int = signal.SIGKILL) -> None:
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, sig)
        self.popen.wait(timeout=240)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def tail(log: Path, lines: int = 60) -> str:
    if not log.exists():
        return "(no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


# Runs between us and the server, and becomes it: asks the kernel for SIGTERM when its parent dies, so that a pytest
# that is SIGKILLed leaves no 3 GB server behind. (A preexec_fn would do it too, but forks a process with threads.)
_LAUNCHER = (
    "import ctypes, os, signal, sys; "
    "sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, signal.SIGTERM); "  # 1 = PR_SET_PDEATHSIG
    "os.execve(sys.argv[1], sys.argv[1:], os.environ)"
)


@contextlib.contextmanager
def running(
    command: Sequence[str], *, env: Mapping[str, str], log: Path, ready: str, timeout_s: float
) -> Iterator[Process]:
    """Starts a server, waits until ``GET ready`` answers 200, and kills the whole group at the end.

    A child that dies, or is not ready in time, raises with the last lines of its log.
    """
    with log.open("wb") as out:
        popen = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=log.parent,
        )
    process = Process(popen, log)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            if popen.poll() is not None:
                raise RuntimeError(
                    f"the server died with status {popen.returncode} while starting ({log}):\n{tail(log)}"
                )
            try:
                if httpx.get(ready, timeout=2.0, trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready after {timeout_s:.0f} s ({log}):\n{tail(log)}")
            time.sleep(0.25)
        yield process
    finally:
        if popen.poll() is None and not process.killed:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(popen.pid, signal.SIGTERM)
                popen.wait(timeout=5)
        process.kill()


def vllm_env(*, candidates: bool = False, python: Path = VLLM_PYTHON) -> dict[str, str]:
    """The environment of a vLLM on CPU: offline, no telemetry, no compiler, dev routes on.

    With ``candidates`` the V2 model runner is on, its kernels run by Triton's interpreter (see shims/sitecustomize.py).
    Its top-k/top-p kernel does not run interpreted and takes the engine down: send no truncation to that server.
    """
    keep = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
    env = {name: os.environ[name] for name in keep if name in os.environ}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the suite shares its cores with the reference and a second server
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # else the first request compiles C++ for 10-17 s, or dies without g++
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CACHE_ROOT": str(python.parents[1] / "cache"),
    }
    if candidates:
        env |= {
            "PYTHONPATH": str(SHIMS),
            "TOPKD_TRITON_ON_CPU": "1",
            "TRITON_INTERPRET": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "1",
        }
    return env


@contextlib.contextmanager
def vllm_server(
    model_dir: Path,
    *,
    model: str,
    log: Path,
    max_logprobs: int,
    max_model_len: int,
    candidates: bool = False,
    lora: bool = False,
    api_key: str | None = None,
    python: Path = VLLM_PYTHON,
) -> Iterator[Endpoint]:
    """A real vLLM API server on loopback."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # `python -m`, not the `vllm` command: that one looks up its own distribution under a name this build does not have.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model_dir), "--served-model-name", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", str(max_model_len), "--max-logprobs", str(max_logprobs)]
    command += ["--enforce-eager", "--enable-scale-out", "--max-num-seqs", "32"]
    if lora:
        command += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]
    env = vllm_env(candidates=candidates, python=python)
    if api_key:
        env["VLLM_API_KEY"] = api_key
    with running(command, env=env, log=log, ready=f"{url}/health", timeout_s=600) as process:
        yield Endpoint("vllm", url, model, model_dir, max_logprobs, max_model_len, process.popen.pid, log, api_key)


@contextlib.contextmanager
def embedded_server(
    model_dir: Path, *, model: str, log: Path, max_logprobs: int, max_model_len: int, api_key: str | None = None
) -> Iterator[Endpoint]:
    """``topkd serve`` as a child process, the way users start it."""
    from topkd.serve import ServeConfig, ServerProcess

    config = ServeConfig(
        model=str(model_dir),
        served_model_name=model,
        port=0,
        max_logprobs=max_logprobs,
        max_model_len=max_model_len,
        api_key=SecretStr(api_key) if api_key else None,
    )
    with ServerProcess(config, log_path=log) as up:
        yield Endpoint("embedded", up.url, model, model_dir, max_logprobs, max_model_len, up.pid, log, api_key)
