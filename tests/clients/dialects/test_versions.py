"""Which weights drew a rollout: from the reply, from the adapter's name, from beside the reply, or unknown."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.dialects.script import Script
from tests.clients.dialects.test_vllm import FAST, PROMPT, choice, sampled
from tests.clients.toy import Wire, refused
from topkd.clients import VllmCompletions
from topkd.topk.samples import SamplingParams


async def drawn(script: Any, times: int = 1, model: str = "t") -> list[str]:
    client = VllmCompletions("http://h:8000", model=model, config=FAST, transport=script)
    rollouts = [(await client.sample(PROMPT, 1, SamplingParams(9)))[0] for _ in range(times)]
    return [rollout.version for rollout in rollouts]


async def test_a_reply_without_a_version_is_of_the_weights_that_stood_before_and_after():
    script = Script(*[(200, sampled(choice()))] * 3)
    script.weights = ["7", "7", "7", "8", "8", "8"]
    assert await drawn(script, 3) == ["7", "7+8", "8"]
    assert script.asked == 6


async def test_a_reply_that_names_its_version_ends_the_questions():
    script = Script(*[(200, sampled(choice(weight_versions=[{"version": "9"}])))] * 3)
    script.weights = ["stale"]
    assert await drawn(script, 3) == ["9", "9", "9"]
    assert script.asked == 1


async def test_a_server_that_tells_nobody_is_asked_once_and_the_version_is_unknown():
    script = Script(*[(200, sampled(choice()))] * 3)
    assert await drawn(script, 3) == ["", "", ""]
    assert script.asked == 1


@pytest.mark.parametrize(
    ("parent", "version"),
    [("base", "lora-3"), (None, "default")],
    ids=["adapter", "named so only"],
)
async def test_a_pushed_adapter_draws_under_its_own_version(parent: str | None, version: str):
    """The version in the reply is that of the weights under the adapter: the same for every push."""

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "base"}, {"id": "base@lora-3", "parent": parent}]}
        if path == "/v1/completions":
            return 200, sampled(choice(weight_versions=[{"version": "default"}]))
        return 404, {"detail": "Not Found"}

    wire = Wire(handler)
    assert await drawn(wire, 2, model="base@lora-3") == [version, version]
    assert sum(path == "/v1/models" for _, path, _ in wire.seen) == 1


async def test_a_question_that_fails_loses_no_draw():
    answers = iter([refused("overloaded", 503), (200, {"weight_version": "4"}), (200, {"weight_version": "4"})])

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        return next(answers) if path == "/weight_info" else (200, sampled(choice()))

    assert await drawn(Wire(handler), 2) == ["", "4"]
