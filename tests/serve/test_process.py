"""The server as a child process: ready with a URL, gone with its parent, clear when it cannot start."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr, ValidationError

from tests.serve.apps import random_ids
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import ServerError, ServerTimeoutError

KEY = "sk-child-process"


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _gone(pid: int, timeout_s: float = 240.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _alive(pid)


def test_a_child_serves_behind_its_key_past_any_proxy_and_ends(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert urllib.request.getproxies()["http"].endswith(":9")
    config = ServeConfig(model=str(models / "policy"), served_model_name="t", port=0, api_key=SecretStr(KEY))
    log = tmp_path / "server.log"
    with ServerProcess(config, log_path=log) as server:
        pid = server.pid
        assert server.url.startswith("http://127.0.0.1:")
        with httpx.Client(base_url=server.url, trust_env=False) as http:
            body = {"model": "t", "prompt": random_ids(4), "max_tokens": 1}
            assert http.get("/health").status_code == 200
            assert http.post("/v1/completions", json=body).status_code == 401
            http.headers["Authorization"] = f"Bearer {KEY}"
            reply = http.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            _hang_up_and_see_the_work_stop(http)
            _hang_up_in_the_middle_of_a_request(server.url)
            assert http.get("/health").status_code == 200
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"topkd.serve" in command
        assert KEY.encode() not in command
    assert _gone(pid)
    assert log.read_text() == f"topkd serve: ready at {server.url} (model t, max_logprobs 20)\n"


def _hang_up_and_see_the_work_stop(http: httpx.Client) -> None:
    body = {"model": "t", "prompt": [9, 10], "n": 8, "max_tokens": 4000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=httpx.Timeout(240, read=0.5))
    deadline = time.monotonic() + 240
    while (load := http.get("/load").json()["server_load"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert load == 0
    drawn = [line for line in http.get("/metrics").text.splitlines() if line.startswith("vllm:generation")]
    assert float(drawn[0].split()[-1]) < 8 * 4000


def _hang_up_in_the_middle_of_a_request(url: str) -> None:
    """Politely and with a reset: a client's way to end is no failure of the server's, and leaves no word in its log."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: 999\r\n\r\n"
    for linger in (b"", struct.pack("ii", 1, 0)):
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as sock:
            sock.sendall(head.encode() + b'{"model": "t", "prom')
            time.sleep(0.1)
            if linger:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


@pytest.mark.slow
def test_a_child_dies_with_a_parent_that_is_killed(models: Path):
    code = (
        "import sys, time; from topkd.serve import ServeConfig, ServerProcess;"
        f"s = ServerProcess(ServeConfig(model={str(models / 'policy')!r}, port=0)).start();"
        "print(s.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _alive(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert _gone(child)


def test_a_child_that_cannot_start_is_one_clear_error(tmp_path: Path):
    with (
        pytest.raises(ServerError, match="died while starting") as caught,
        ServerProcess(ServeConfig(model=str(tmp_path), port=0)),
    ):
        pass
    assert "exit status 2" in str(caught.value)
    assert "the folder holds no model" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_unknown_model_id_is_one_clear_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ServerError, match=r"no such folder \(model=no/such-model\)") as caught:
        ServerProcess(ServeConfig(model="no/such-model", port=0)).start()
    assert "Traceback" not in str(caught.value)


def test_a_taken_port_is_one_line_and_exit_status_2(models: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "topkd.serve", str(models / "policy"), "--port", str(port)],
            check=False,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"topkd serve: cannot listen (127.0.0.1:{port})")


def test_a_start_that_takes_too_long_is_an_error_and_leaves_no_child(models: Path):
    server = ServerProcess(ServeConfig(model=str(models / "policy"), port=0), startup_timeout_s=0.0)
    with pytest.raises(ServerTimeoutError, match="not ready after"):
        server.start()
    with pytest.raises(ServerError, match="not running"):
        _ = server.pid


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_in_order_with_exit_code_0(models: Path, number: signal.Signals):
    command = [sys.executable, "-m", "topkd.serve", str(models / "policy"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("topkd serve: ready at ")
        child.send_signal(number)
        _, errors = child.communicate(timeout=240)
    assert child.returncode == 0
    assert errors == "", "no traceback, and no progress bar of a model being loaded"


def test_the_package_and_its_client_half_load_no_torch():
    code = (
        "import json, sys, topkd.serve as s; s.ServeConfig(model='x'); s.ServerProcess(s.ServeConfig(model='x'));"
        "print(json.dumps([m for m in ('torch', 'transformers', 'uvicorn', 'starlette', 'httpx') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    "wrong", [{"port": 70000}, {"max_logprobs": -2}, {"api_key": ""}, {"dtype": "int8"}, {"modle": "x"}, {"model": ""}]
)
def test_a_config_that_cannot_be_right_is_refused(wrong: dict):
    with pytest.raises(ValidationError):
        ServeConfig(**{"model": "m", **wrong})
