"""In-process vLLM: flat tables read as arrays here, a real engine in its own venv by subprocess."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.toy import VOCAB, Toy
from topkd.clients.dialects.vllm_inprocess import VllmInProcess, read_flat_scores
from topkd.topk.errors import (
    AlignmentError,
    ConfigError,
    ContextLimitError,
    FinalServerError,
    KLimitError,
    ResponseError,
    SyncError,
)
from topkd.topk.protocols import WeightUpdate
from topkd.topk.samples import SamplingParams

TOY = Toy(seed=5)
IDS = np.random.default_rng(1).integers(0, VOCAB, 9).astype(np.int32)


@dataclass
class Flat:
    """The engine's own container, by its documented attributes."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def row(self, actual: int | None, row: np.ndarray, k: int) -> None:
        self.start_indices.append(len(self.token_ids))
        if actual is not None:
            listed = [(actual, float(row[actual])), *TOY.top(row, k)]
            self.token_ids += [token for token, _ in listed]
            self.logprobs += [logp for _, logp in listed]
        self.end_indices.append(len(self.token_ids))


def prompt_table(ids: Any, k: int) -> Flat:
    table = Flat()
    table.row(None, TOY.logp[0], k)
    for row, token in zip(TOY.rows(ids), list(ids)[1:], strict=True):
        table.row(int(token), row, k)
    return table


class VLLMValidationError(Exception):
    """As in vLLM 0.32: not a ValueError."""


class Engine:
    """``vllm.LLM`` as far as it is used: refuses what the real one refuses, a whole batch for one bad request."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.adapters: list[tuple[str, int] | None] = []
        self.cache_resets = True
        self.dead = False

    def generate(
        self, inputs: list[dict], sampling: list[Any], *, use_tqdm: bool, lora_request: Any = None
    ) -> list[Any]:
        adapters = lora_request if isinstance(lora_request, list) else [lora_request] * len(inputs)
        for adapter in adapters:
            if adapter is not None and "missing" in adapter.lora_path:
                raise ValueError(f"no adapter in {adapter.lora_path}")
            self.adapters.append(adapter and (adapter.lora_name, adapter.lora_int_id))
        self.batches.append(len(inputs))
        if self.dead:
            raise RuntimeError("EngineCore encountered an issue")
        for one, params in zip(inputs, sampling, strict=True):
            k = getattr(params, "prompt_logprobs", None)
            if k is not None and k > 20:
                raise VLLMValidationError(f"Requested prompt logprobs of {k}, which is greater than max allowed: 20")
            if len(one["prompt_token_ids"]) > 64:
                raise VLLMValidationError("The decoder prompt is longer than the maximum model length of 64.")
        return [self._one(one["prompt_token_ids"], params) for one, params in zip(inputs, sampling, strict=True)]

    def _one(self, ids: list[int], params: Any) -> Any:
        outputs = []
        for index in range(getattr(params, "n", 1)):
            drawn = TOY.draw(ids, params.max_tokens, seed=index)
            table = Flat()
            for row, token in zip(TOY.rows([*ids, *drawn])[len(ids) - 1 :], drawn, strict=True):
                table.row(token, row, getattr(params, "logprobs", 0))
            outputs.append(types.SimpleNamespace(index=index, token_ids=drawn, logprobs=table, finish_reason="length"))
        k = getattr(params, "prompt_logprobs", None)
        asked = getattr(params, "prompt_logprob_token_ids", None)
        matrix = None
        if asked is not None:
            rows = TOY.rows(ids)[params.prompt_logprob_start :]
            matrix = np.array(
                [[-np.inf if t < 0 else row[t] for t in wanted] for row, wanted in zip(rows, asked, strict=True)]
            )
        table = None if k is None else prompt_table(ids, k)
        return types.SimpleNamespace(prompt_logprobs=table, prompt_token_id_logprobs=matrix, outputs=outputs)

    def collective_rpc(self, method: str, kwargs: dict[str, str]) -> None:
        assert method == "reload_weights"
        if "missing" in kwargs["weights_path"]:
            raise FileNotFoundError(kwargs["weights_path"])

    def reset_prefix_cache(self) -> bool:
        return self.cache_resets


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    fake = types.ModuleType("vllm")
    fake.SamplingParams = types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for name in ("vllm.lora", "vllm.lora.request"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm.lora.request"].LoRARequest = lambda name, number, path: types.SimpleNamespace(  # type: ignore[attr-defined]
        lora_name=name, lora_int_id=number, lora_path=path
    )
    return Engine()


async def test_scores_are_the_models_own_rows_and_waiting_requests_go_together(engine: Engine):
    async with VllmInProcess(engine, vocab_size=VOCAB) as up:
        prompts = [IDS[:n] for n in (9, 4, 7, 2, 8)]
        scores = await asyncio.gather(*(up.score(ids, 0, 6) for ids in prompts))
    for ids, got in zip(prompts, scores, strict=True):
        rows = TOY.rows(ids)
        np.testing.assert_array_equal(got.ids, np.argsort(-rows, axis=1)[:, :6])
        np.testing.assert_allclose(got.actual_logp, rows[np.arange(len(rows)), ids[1:]], atol=1e-6)
    assert sum(engine.batches) == 5
    assert max(engine.batches) > 1, "what waits is given to the engine together"


async def test_a_refused_request_does_not_take_its_batch_with_it(engine: Engine):
    async with VllmInProcess(engine) as up:
        results = await asyncio.gather(
            up.score(IDS, 0, 3),
            up.score(IDS, 0, 21),
            up.score(np.resize(IDS, 70), 0, 3),
            up.score(IDS, 4, 3),
            return_exceptions=True,
        )
    assert isinstance(results[1], KLimitError)
    assert results[1].limit == 20
    assert isinstance(results[2], ContextLimitError)
    assert (results[0].rows, results[3].rows) == (8, 4)


async def test_an_engine_that_died_is_an_error_for_everyone_who_waits(engine: Engine):
    engine.dead = True
    async with VllmInProcess(engine) as up:
        for result in await asyncio.gather(*(up.score(IDS, 0, 3) for _ in range(3)), return_exceptions=True):
            assert isinstance(result, FinalServerError)
            assert "EngineCore" in str(result)


async def test_draws_and_candidates_are_exact(engine: Engine):
    async with VllmInProcess(engine, vocab_size=VOCAB, version="7") as up:
        drawn = await up.sample(IDS, 2, SamplingParams(5), k=4)
        for rollout in drawn:
            rows = TOY.rows([*IDS, *rollout.completion_ids])[len(IDS) - 1 :]
            np.testing.assert_allclose(rollout.logp, rows[np.arange(5), rollout.completion_ids], atol=1e-6)
            assert rollout.topk is not None
            np.testing.assert_array_equal(rollout.topk.ids, np.argsort(-rows, axis=1)[:, :4])
            assert rollout.version == "7"
        [hot] = await up.sample(IDS, 1, SamplingParams(5, temperature=0.5))
        assert np.isnan(hot.logp).all()
        asked = np.array([[3, -1], [4, 9], [0, 1], [7, 7]])
        got = await up.score_candidates(IDS, 4, asked)
        truth = np.take_along_axis(TOY.rows(IDS)[4:], np.maximum(asked, 0), axis=1)
        np.testing.assert_allclose(got, np.where(asked < 0, -np.inf, truth), atol=1e-6)


async def test_new_weights_are_confirmed_only_with_the_cache_reset(engine: Engine):
    async with VllmInProcess(engine) as up:
        assert await up.push(WeightUpdate("full", "step-2", "v2")) == "v2"
        with pytest.raises(SyncError, match="missing"):
            await up.push(WeightUpdate("full", "missing", "v3"))
        engine.cache_resets = False
        with pytest.raises(SyncError, match="prefix cache"):
            await up.push(WeightUpdate("full", "step-4", "v4"))
        assert up.version == "v2"


async def test_an_adapter_is_what_everything_runs_with_once_the_engine_has_proved_it(engine: Engine):
    async with VllmInProcess(engine) as up:
        await up.sample(IDS, 1, SamplingParams(2))
        for version in ("v1", "v2"):
            assert await up.push(WeightUpdate("lora", f"adapters/{version}", version)) == version
        with pytest.raises(SyncError, match="missing"):
            await up.push(WeightUpdate("lora", "missing", "v3"))
        [rollout] = await up.sample(IDS, 1, SamplingParams(2))
        assert rollout.version == up.version == "v2"
    # v3, which failed, has used up a number; each adapter has its own, as cached prefixes go by it.
    assert engine.adapters == [None, ("v1", 1), ("v2", 2), ("v2", 2)]


async def test_an_engine_that_cannot_sleep_says_so(engine: Engine):
    async with VllmInProcess(engine) as up:
        with pytest.raises(FinalServerError, match="sleep"):
            await up.sleep()


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda t: t.start_indices.pop(), AlignmentError),
        (
            lambda t: t.token_ids.__setitem__(t.start_indices[3], 0 if t.token_ids[t.start_indices[3]] else 1),
            AlignmentError,
        ),
        (lambda t: t.end_indices.__setitem__(4, t.end_indices[4] - 1), ResponseError),
        (lambda t: t.logprobs.__setitem__(9, float("nan")), ResponseError),
        (lambda t: t.logprobs.__setitem__(t.start_indices[2], -50.0), AlignmentError),
        (lambda t: t.token_ids.__setitem__(t.start_indices[2] + 1, VOCAB), ResponseError),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(spoil: Any, error: Any):
    table = prompt_table(IDS, VOCAB - 1)
    spoil(table)
    with pytest.raises(error):
        read_flat_scores(table, IDS, 0, VOCAB - 1, VOCAB)


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"topkd\[vllm\]"):
        VllmInProcess("models/teacher")


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_engine_scores_draws_and_takes_new_weights_within_1e_4_of_float64(tmp_path: Path):
    from tests.contract.conftest import need_vllm
    from tests.contract.reference import logp_rows
    from tests.contract.servers import ROOT, VLLM_PYTHON, vllm_env
    from tests.contract.wire import token_ids
    from tests.fakes.tinymodels import make_tiny_model

    need_vllm()
    policy, updated = tmp_path / "policy", tmp_path / "updated"
    make_tiny_model(policy, seed=1, std=0.25)
    make_tiny_model(updated, seed=2, std=0.25)
    prompts, k = [token_ids(n, seed=700 + n) for n in (17, 3, 120)], 5
    (tmp_path / "request.json").write_text(json.dumps({"prompts": prompts, "k": k}))
    program = Path(__file__).with_name("inprocess_program.py")
    done = subprocess.run(
        [str(VLLM_PYTHON), str(program), str(ROOT), str(policy), str(updated), str(tmp_path / "request.json")],
        env=vllm_env(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("REPLY ")]
    reply = json.loads(line.removeprefix("REPLY "))

    def right(table: dict[str, Any], ids: list[int], folder: Path) -> None:
        exact = logp_rows(folder, ids)[table["start"] : -1]
        np.testing.assert_allclose(np.take_along_axis(exact, np.array(table["ids"]), axis=1), table["logp"], atol=1e-4)
        np.testing.assert_allclose(-np.sort(-exact, axis=1)[:, :k], table["logp"], atol=1e-4)
        realised = exact[np.arange(len(exact)), ids[table["start"] + 1 :]]
        np.testing.assert_allclose(realised, table["actual"], atol=1e-4)

    for ids, table in zip(prompts, reply["scores"], strict=True):
        right(table, ids, policy)
    for drawn in reply["drawn"]:
        right(drawn["topk"], prompts[0] + drawn["ids"], policy)
        np.testing.assert_allclose(drawn["logp"], drawn["topk"]["actual"], atol=1e-6)
    assert (reply["k_above"], reply["too_long"]) == ("KLimitError", "ContextLimitError")
    assert reply["candidates"] == "UnsupportedError", "stock CPU runs model runner V1"
    assert reply["hot_unknown"] is True
    assert (reply["version"], reply["late_version"]) == ("step-2", "step-2")
    right(reply["after"], prompts[0], updated)
    exact = logp_rows(updated, prompts[0] + reply["late"]["ids"])[len(prompts[0]) - 1 : -1]
    np.testing.assert_allclose(exact[np.arange(4), reply["late"]["ids"]], reply["late"]["logp"], atol=1e-4)
