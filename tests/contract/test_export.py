"""A real vLLM loads what ``topkd export`` wrote, and says the same of it as transformers."""

import json

import numpy as np
import pytest

from tests.contract.conftest import need_vllm
from tests.contract.servers import vllm_server
from tests.fakes.tinymodels import make_tiny_model
from topkd.clients import connect
from topkd.compose.export import export
from topkd.engine.checkpoint.checkpoint import save_student
from topkd.engine.models.local_teacher import LocalTeacher
from topkd.engine.models.student import Student
from topkd.engine.models.tokenizer import load_tokenizer


@pytest.mark.vllm
@pytest.mark.slow
async def test_a_real_vllm_serves_an_exported_student(tmp_path):
    need_vllm()
    base = make_tiny_model(tmp_path / "base", seed=1, std=0.25)
    student = Student.load(str(make_tiny_model(tmp_path / "trained", seed=2, std=0.25)), "cpu")
    run = tmp_path / "run"
    save_student(student, load_tokenizer(str(base)), run / "student", {"version": 3})
    config = {"student": {"model": str(base)}, "teacher": {"url": "http://127.0.0.1:1"}, "data": {"path": "p"}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text("")  # a run's folder has both
    folder = export(run).path
    ids = np.arange(100, 140)
    with vllm_server(
        folder, model="exported", log=tmp_path / "vllm.log", max_logprobs=20, max_model_len=256
    ) as endpoint:
        async with await connect(endpoint.url) as client:
            served = await client.score(ids, 3, 20)
    wanted = await LocalTeacher(student).score(ids, 3, 20)
    np.testing.assert_allclose(served.actual_logp, wanted.actual_logp, atol=2e-3)
    np.testing.assert_allclose(served.mass(), wanted.mass(), atol=2e-3)
