"""A whole run behind a server of which every tenth answer is a fault: the same run, to the bit."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.fakes.tinymodels import make_tiny_model
from tests.faults.server import VOCAB, FaultyServer
from tests.faults.test_soak import FAULTS
from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.engine.loop.metrics import TRAFFIC, read_metrics

STEPS, PROMPTS, SAMPLES = 12, 6, 4
TIMINGS = {"sample_s", "score_wait_s", "learn_s", "publish_s", "elapsed_s", *TRAFFIC}


def run_config(folder: Path, url: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "steps": STEPS,
            "seed": 5,
            "k": 8,
            "max_staleness": 1,
            "max_lost_fraction": 0.0,
            "student": {"model": str(folder / "student"), "device": "cpu"},
            "teacher": {"url": url, "dialect": "vllm", "vocab_size": VOCAB},
            "data": {"path": str(folder / "prompts.jsonl")},
            "rollout": {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "max_completion_tokens": 12},
            "learner": {"lr": 1e-3},
            "client": {"max_retries": 8, "response_retries": 6, "backoff_s": 0.005, "backoff_max_s": 0.05,
                       "read_timeout_s": 60.0, "total_timeout_s": 600.0},
        }
    )  # fmt: skip


async def run(folder: Path, out: Path, share: int) -> tuple[list[dict[str, Any]], dict[str, Any], FaultyServer]:
    """A run against a server that answers a ``share``th of the requests with a fault, whatever their order."""
    asked: Counter[bytes] = Counter()

    def plan(_: int, request: dict[str, Any]) -> str | None:
        ids = np.array(request["prompt"], dtype="<i4").tobytes()
        asked[ids] += 1
        mark = zlib.crc32(ids + bytes([asked[ids]]))
        return FAULTS[mark // share % len(FAULTS)] if share and mark % share == 0 else None

    async with FaultyServer(plan) as server:
        await train(run_config(folder, server.url), out)
    steps = read_metrics(out / "metrics.jsonl", "step")
    weights = load_file(next((out / "student").glob("*.safetensors")))
    return steps, weights, server


def _words(folder: Path) -> None:
    """Ids whose bytes nobody knows: the server's decoded tokens are nonsense on purpose, and have nothing to match."""
    for file in folder.glob("*token*"):
        file.unlink()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)


@pytest.mark.slow
async def test_recoverable_faults_change_neither_the_result_nor_the_order_of_a_run(tmp_path: Path):
    make_tiny_model(tmp_path / "student", seed=1, hidden=32, vocab=VOCAB, std=0.25)
    _words(tmp_path / "student")
    rows = [json.dumps({"prompt_ids": [9 + i, 700 + i, 40]}) + "\n" for i in range(30)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    calm, calm_weights, _ = await run(tmp_path, tmp_path / "calm", 0)
    steps, weights, server = await run(tmp_path, tmp_path / "faulty", 10)
    assert sum(server.faults.values()) >= STEPS * PROMPTS * SAMPLES * 0.07
    assert len(server.faults) >= 10, "most kinds of faults have been met"
    told = [{key: value for key, value in step.items() if key not in TIMINGS} for step in steps]
    assert json.dumps(told) == json.dumps(
        [{key: step[key] for key in one} for one, step in zip(told, calm, strict=True)]
    )
    assert all(step["lost"] == {} for step in steps)
    assert weights.keys() == calm_weights.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(tensor, calm_weights[name])
    for name in ("retries", "requests"):
        assert sum(step[name] for step in steps) > sum(step[name] for step in calm)
    assert sum(step["retries"] for step in calm) == 0
    assert sum(step["requests"] for step in calm) == STEPS * PROMPTS * SAMPLES
    assert sum(step["scored_tokens"] for step in steps) == sum(step["completion_tokens"] for step in steps)
    assert sum(step["failed_requests"] for step in steps) == 0
