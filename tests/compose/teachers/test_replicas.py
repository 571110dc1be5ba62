"""A run's teacher as several replicas: the same run as with one, and none at all when they are not one teacher."""

import contextlib
import json

import pytest

from tests.engine.pieces import model_folder
from topkd.compose.config.run_config import RunConfig
from topkd.compose.teachers.open import TeacherUsage
from topkd.compose.train import train
from topkd.engine.loop.metrics import TRAFFIC, read_metrics
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import ResponseError


def run_config(root, url):
    return RunConfig.model_validate(
        {
            "steps": 3,
            "student": {"model": str(root / "student"), "device": "cpu"},
            "teacher": {"url": url},
            "data": {"path": str(root / "prompts.jsonl")},
            "rollout": {"prompts_per_step": 6, "samples_per_prompt": 2, "max_completion_tokens": 8},
            "learner": {"lr": 3e-3},
        }
    )


@pytest.mark.slow
async def test_replicas_share_the_work_of_one_teacher_and_must_be_one(tmp_path):
    for name, seed in (("student", 1), ("teacher", 2), ("other", 3)):
        model_folder(tmp_path / name, seed=seed)
    rows = [json.dumps({"prompt_ids": [5 + i, 9], "id": i}) + "\n" for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    with contextlib.ExitStack() as stack:

        def served(folder):
            config = ServeConfig(model=str(tmp_path / folder), served_model_name="t", port=0, device="cpu")
            return stack.enter_context(ServerProcess(config)).url

        first, second, other = served("teacher"), served("teacher"), served("other")
        await train(run_config(tmp_path, first), tmp_path / "one")
        await train(run_config(tmp_path, [first, second]), tmp_path / "two")
        with pytest.raises(ResponseError, match="replicas disagree"):
            await train(run_config(tmp_path, [first, other]), tmp_path / "mixed")
    one, two = (read_metrics(tmp_path / run / "metrics.jsonl", "step") for run in ("one", "two"))
    for name in ("loss", "kl_k1", "grad_norm"):
        assert [step[name] for step in two] == pytest.approx([step[name] for step in one], rel=1e-4)
    assert [sum(step["requests"] for step in run) for run in (one, two)] == [36, 36]
    for run in (one, two):
        assert sum(step["scored_tokens"] for step in run) == sum(step["completion_tokens"] for step in run)


def test_a_password_in_any_of_the_urls_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without user name and password"):
        run_config(tmp_path, ["http://a:1", "http://me:secret@b:1"])


def test_traffic_is_what_was_added_since_the_last_record_summed_over_teachers():
    counts = [{"tries": 5.0, "scored_rows": 40.0}, {"tries": 1.0}]
    hits = {"hits": 0, "joined": 0}
    traffic = TeacherUsage()
    for count in counts:
        traffic.client(lambda count=count: count)
    traffic.cache(lambda: hits)
    assert traffic.since_last() == dict.fromkeys(TRAFFIC, 0), "what it took to meet the teachers is no step's"
    counts[0] |= {"tries": 9.0, "retries": 1.0, "scored_rows": 100.0}
    counts[1] |= {"tries": 4.0, "reply_bytes": 1234.0}
    hits |= {"hits": 2, "joined": 1}
    assert traffic.since_last() == {
        "requests": 7, "retries": 1, "failed_requests": 0, "cache_hits": 3, "scored_tokens": 60, "teacher_bytes": 1234
    }  # fmt: skip
    assert traffic.since_last() == dict.fromkeys(TRAFFIC, 0)


def test_the_students_support_and_a_cache_exclude_each_other_before_anything_is_opened(tmp_path):
    values = run_config(tmp_path, "http://a:1").model_dump(mode="json", exclude={"teachers"})
    values |= {"objective": {"kind": "topk_pg", "support": "union"}}
    RunConfig.model_validate(values)
    with pytest.raises(ValueError, match=r"a \[cache\] holds only the teacher's own lists"):
        RunConfig.model_validate(values | {"cache": {"path": "cache"}})
