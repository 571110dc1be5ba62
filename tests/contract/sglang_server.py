"""A real SGLang on CPU as a subprocess: its own server from its own wheel, with stand-ins for CUDA kernels alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.contract.servers import ROOT, Endpoint, free_port, running

SGLANG_PYTHON = Path(os.environ.get("SGLANG_VENV", ROOT / ".venv-sglang")) / "bin" / "python"
SHIMS = Path(__file__).parent / "sglang_shims"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sglang_env(home: Path) -> dict[str, str]:
    """The environment of an SGLang on CPU: offline, no compiler, stand-ins first on the path."""
    keep = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in keep if name in os.environ} | {
        "HOME": str(home),  # it writes caches there
        "PYTHONPATH": str(SHIMS),
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # a repetition penalty is compiled on its first use otherwise
    }


@contextlib.contextmanager
def sglang_server(
    model_dir: Path, *, model: str, log: Path, max_model_len: int = 512, kv_tokens: int = 16384, lora: bool = False
) -> Iterator[Endpoint]:
    """A real SGLang API server on loopback; killed with its process group."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(SGLANG_PYTHON), "-m", "sglang.launch_server", "--model-path", str(model_dir)]
    command += ["--served-model-name", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command += ["--attention-backend", "torch_native", "--dtype", "float32", "--context-length", str(max_model_len)]
    command += ["--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"]
    command += ["--max-total-tokens", str(kv_tokens), "--mem-fraction-static", "0.2", "--max-running-requests", "16"]
    command += ["--skip-server-warmup", "--sleep-on-idle"]
    if lora:
        command += ["--enable-lora", "--max-lora-rank", "16", "--lora-target-modules", *LORA_TARGETS]
        command += ["--lora-backend", "torch_native"]
    env = sglang_env(log.parent)
    with running(command, env=env, log=log, ready=f"{url}/health", timeout_s=600) as process:
        yield Endpoint("sglang", url, model, model_dir, 0, max_model_len, process.popen.pid, log)
