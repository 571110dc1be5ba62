"""The two servers, started once a session, and the tiny models they serve."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contract.adapters import make_adapter
from tests.contract.servers import VLLM_PYTHON, Endpoint, embedded_server, tail, vllm_server
from tests.fakes.tinymodels import make_tiny_model

SERVERS = [
    pytest.param("embedded", id="embedded"),
    pytest.param("vllm", id="vllm", marks=[pytest.mark.vllm, pytest.mark.slow]),
]
API_KEY = "sk-contract-0123456789"
MAX_LOGPROBS = 64
MAX_MODEL_LEN = 1024


@dataclass(frozen=True)
class Models:
    """Folders every server of this machine can read."""

    policy: Path
    updated: Path  # the same shapes, other weights: what another optimiser step leaves behind
    adapter: Path
    updated_adapter: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    policy, updated = root / "policy", root / "updated"
    # Weights tame enough that a float32 engine stays within 1e-4 of float64 at 1000 tokens, on any CPU's kernels.
    make_tiny_model(policy, seed=1, std=0.25)
    make_tiny_model(updated, seed=2, std=0.25)
    return Models(
        policy=policy,
        updated=updated,
        adapter=make_adapter(policy, root / "adapter", seed=3),
        updated_adapter=make_adapter(policy, root / "updated_adapter", seed=4),
    )


def need_vllm() -> None:
    if not VLLM_PYTHON.exists():
        pytest.fail(f"no real vLLM at {VLLM_PYTHON}: run `bash scripts/setup_vllm.sh`", pytrace=False)


@pytest.fixture(scope="session")
def embedded(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The one embedded server of a session: it does all that the two real ones do."""
    log = tmp_path_factory.mktemp("embedded") / "server.log"
    with embedded_server(
        models.policy, model="t", log=log, max_logprobs=MAX_LOGPROBS, max_model_len=MAX_MODEL_LEN, api_key=API_KEY
    ) as up:
        yield up


@pytest.fixture(scope="session")
def vllm(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    need_vllm()
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with vllm_server(
        models.policy, model="t", log=log, max_logprobs=MAX_LOGPROBS, max_model_len=MAX_MODEL_LEN, lora=True
    ) as up:
        yield up


@pytest.fixture(scope="session")
def guarded_vllm(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    need_vllm()
    log = tmp_path_factory.mktemp("guarded-vllm") / "server.log"
    with vllm_server(
        models.policy,
        model="t",
        log=log,
        max_logprobs=MAX_LOGPROBS,
        max_model_len=MAX_MODEL_LEN,
        candidates=True,
        api_key=API_KEY,
    ) as up:
        yield up


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Endpoint:
    """Every test that takes it runs against the embedded server and against the real vLLM."""
    up: Endpoint = request.getfixturevalue(request.param)
    return up


@pytest.fixture(params=SERVERS)
def guarded(request: pytest.FixtureRequest) -> Endpoint:
    """As ``server``, with an API key; the real one runs model runner V2, which scores candidates."""
    up: Endpoint = request.getfixturevalue("guarded_vllm" if request.param == "vllm" else "embedded")
    return up


@pytest.fixture(params=SERVERS)
def doomed(
    request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """A server that the test may kill: an embedded one of its own, or the guarded vLLM, which no later test needs."""
    if request.param == "vllm":
        yield request.getfixturevalue("guarded_vllm")
        return
    log = tmp_path_factory.mktemp("doomed") / "server.log"
    with embedded_server(
        models.policy, model="t", log=log, max_logprobs=MAX_LOGPROBS, max_model_len=MAX_MODEL_LEN, api_key=API_KEY
    ) as up:
        yield up


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Never more than two real servers at once, 3 GB each: those of one module first, tests that kill theirs last."""

    def turn(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return ("doomed" in names) - ("older_vllm" in names or "hostile" in names)

    items.sort(key=turn)


@pytest.fixture
def cleanup() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Registers what must be undone on a shared server, whatever the test does."""
    with contextlib.ExitStack() as stack:
        yield stack.callback


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test shows the last lines of the server it talked to."""
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Endpoint):
                report.sections.append((f"{value.kind} log {value.log}", tail(value.log)))  # type: ignore[attr-defined]
    return report
