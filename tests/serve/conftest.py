"""Tiny models and one server over them, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette

from tests.fakes.tinymodels import make_tiny_model
from tests.serve.apps import make_app


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: ``policy`` and ``updated`` (same shapes), ``wide`` (another shape), ``llama``."""
    root = tmp_path_factory.mktemp("serve-models")
    make_tiny_model(root / "policy", seed=1)
    make_tiny_model(root / "updated", seed=2)
    make_tiny_model(root / "wide", seed=3, hidden=128)
    make_tiny_model(root / "llama", seed=4, arch="llama", padded_vocab=2176, tie=True)
    return root


@pytest.fixture(scope="session")
def app(models: Path) -> Iterator[Starlette]:
    """The server most tests share: it must be left as it was."""
    app = make_app(models / "policy")
    yield app
    app.state.served.engine.stop()
