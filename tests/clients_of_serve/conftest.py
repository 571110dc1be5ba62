"""One `topkd serve`, and third-party clients that run as programs in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.servers import Endpoint, embedded_server
from tests.fakes.tinymodels import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("CLIENTS_VENV", ROOT / ".venv-clients")) / "bin" / "python"
PROGRAMS = Path(__file__).parent / "programs"
API_KEY = "sk-clients-0123456789"
# No client may look for anything on a network, or report anything to one.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "WANDB_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "NO_PROXY": "*",
}
Program = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients") / "teacher"
    make_tiny_model(folder, seed=1, std=0.25)
    return folder


@pytest.fixture(scope="session")
def student(teacher: Path) -> Path:
    folder = teacher.parent / "student"
    make_tiny_model(folder, seed=2, std=0.25)
    return folder


@pytest.fixture(scope="session")
def server(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    log = tmp_path_factory.mktemp("clients-server") / "server.log"
    with embedded_server(
        teacher, model="tiny", log=log, max_logprobs=20, max_model_len=512, api_key=API_KEY
    ) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def open_server(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The same without a key: TRL's client has none to send."""
    log = tmp_path_factory.mktemp("clients-open-server") / "server.log"
    with embedded_server(teacher, model="tiny", log=log, max_logprobs=20, max_model_len=512) as endpoint:
        yield endpoint


@pytest.fixture
def run(tmp_path: Path) -> Program:
    """Run a program in the clients' environment; it gets its arguments as JSON, and prints JSON as its last line."""
    if not PYTHON.exists():
        pytest.fail(f"no clients at {PYTHON}: run `bash scripts/setup_clients.sh`", pytrace=False)

    def run_program(name: str, **arguments: Any) -> dict[str, Any]:
        keep = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        done = subprocess.run(
            [PYTHON, PROGRAMS / f"{name}.py", json.dumps(arguments)],
            cwd=tmp_path,
            env={**keep, **OFFLINE, "PYTHONPATH": "", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))

    return run_program
