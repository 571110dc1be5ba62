"""TRL trains a student on the teacher behind `topkd serve`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients_of_serve.conftest import Program
from tests.contract.servers import Endpoint

pytestmark = [pytest.mark.clients, pytest.mark.slow]


def test_trl_takes_the_steps_that_it_takes_on_the_same_teacher_in_memory(
    open_server: Endpoint, student: Path, run: Program
):
    found = run("use_trl", url=open_server.url, teacher=str(open_server.model_dir), student=str(student))
    for name in ("forward", "mixed"):
        served, local = found[name]
        assert len(served) == 6
        assert served == pytest.approx(local, abs=1e-4)
        assert len(set(served)) == 6, "the student did not change"
