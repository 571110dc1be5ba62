"""Weights to a server: confirmed by the server and by what it generates, or refused with the server untouched."""

import asyncio
import shutil

import numpy as np
import pytest
import torch

from tests.contract.adapters import make_adapter
from tests.fakes.tinymodels import make_tiny_model
from topkd.clients import ClientConfig, Sglang, VllmCompletions
from topkd.clients.http.transport import Reply
from topkd.clients.weights.sinks import SglangWeightSink, VllmWeightSink
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk import SamplingParams
from topkd.topk.errors import ServerUnreachableError, SyncError
from topkd.topk.protocols import WeightUpdate

QUICK = ClientConfig(max_retries=1, backoff_s=0.05, total_timeout_s=60.0)
PROMPT = list(range(20, 60))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, seed, hidden in (("old", 1, 64), ("new", 2, 64), ("wide", 3, 96)):
        make_tiny_model(root / name, arch="qwen2", seed=seed, hidden=hidden, layers=2, vocab=300)
    make_adapter(root / "old", root / "adapter", seed=4)
    return root


@pytest.fixture
def server(models):
    config = ServeConfig(model=str(models / "old"), served_model_name="policy", port=0, max_logprobs=5, device="cpu")
    with ServerProcess(config) as running:
        yield running


def reference(folder, ids):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits.double(), -1).numpy()


async def generated_error(server, folder, model=None):
    """Largest error of generated logprobs against a folder's own: scores would hide a stale cache."""
    async with VllmCompletions(server.url, model=model or "policy", config=QUICK) as client:
        (rollout,) = await client.sample(PROMPT, 1, SamplingParams(max_tokens=6, seed=1))
    rows = reference(folder, [*PROMPT, *rollout.completion_ids.tolist()])[len(PROMPT) - 1 : -1]
    return float(np.abs(rows[np.arange(len(rows)), rollout.completion_ids] - rollout.logp).max())


async def test_a_full_push_changes_what_is_generated_and_returns_the_confirmed_version(server, models):
    assert await generated_error(server, models / "old") < 1e-3
    async with VllmWeightSink(server.url, config=QUICK, reference=str(models / "old")) as sink:
        assert await sink.push(WeightUpdate("full", str(models / "new"), "step-1")) == "step-1"
        assert (await sink._get("/weight_info"))["weight_version"] == "step-1"
        assert sink.sampling_model == "policy"
    assert await generated_error(server, models / "new") < 1e-3
    assert await generated_error(server, models / "old") > 0.1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "config.json: No such file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no .*safetensors file"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-100]
            ),
            "shorter or longer than its header",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: "),
    ],
    ids=["absent", "no weights", "torn", "bad config"],
)
async def test_a_folder_that_cannot_be_loaded_is_refused_before_the_server_hears_of_it(
    models, tmp_path, spoil, message
):
    folder = tmp_path / "checkpoint"
    shutil.copytree(models / "new", folder)
    spoil(folder)
    async with VllmWeightSink("http://127.0.0.1:1", model="policy", config=QUICK) as sink:  # nobody listens there
        with pytest.raises(SyncError, match=message):
            await sink.push(WeightUpdate("full", str(folder), "v"))


async def test_another_shape_is_refused_untouched_and_serving_goes_on(server, models):
    async with VllmWeightSink(server.url, config=QUICK, reference=str(models / "old")) as sink:
        with pytest.raises(SyncError, match=r"does not fit the model that is served.*not touched"):
            await sink.push(WeightUpdate("full", str(models / "wide"), "v"))
        assert (await sink._get("/is_paused")) == {"is_paused": False}
    assert await generated_error(server, models / "old") < 1e-3


async def test_a_reload_that_fails_on_the_server_says_so_and_the_server_is_not_left_paused(server, models):
    async with VllmWeightSink(server.url, config=QUICK) as sink:  # no reference: the server finds out by itself
        with pytest.raises(SyncError, match=r"failed half-way.*restart it"):
            await sink.push(WeightUpdate("full", str(models / "wide"), "v"))
        assert (await sink._get("/is_paused")) == {"is_paused": False}
        assert sink.version == ""


async def test_adapters_get_versioned_names_and_the_oldest_goes(server, models):
    async with VllmWeightSink(server.url, config=QUICK, keep_adapters=1) as sink:
        for version in ("1", "2"):
            await sink.push(WeightUpdate("lora", str(models / "adapter"), version))
            assert sink.sampling_model == f"policy@{version}"
        assert await sink._adapter_names() == ["policy", "policy@2"]
        with pytest.raises(SyncError, match="not loaded"):
            await sink.push(WeightUpdate("lora", str(models / "adapter"), "2"))
    assert await generated_error(server, models / "old", "policy@2") > 0.005  # the adapter is what answers
    assert await generated_error(server, models / "old") < 1e-3  # and the base is as it was


class Script:
    """A transport that answers from a table and keeps the order of what was asked; an unlisted route is an error."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    async def send(self, request):
        path = "/" + request.url.split("/", 3)[3].split("?")[0]
        self.asked.append(path)
        body = self.answers[path.strip("/").replace("/", "_")]
        if isinstance(body, Exception):
            raise body
        return Reply(200, {}, body if isinstance(body, bytes) else repr(body).replace("'", '"').encode())

    async def aclose(self):
        pass


GOOD = {
    "pause": {"status": "paused"},
    "collective_rpc": {"results": []},
    "reset_prefix_cache": {"success": 1},
    "update_weight_version": {"success": 1},
    "weight_info": {"weight_version": "v9"},
    "resume": {"status": "resumed"},
    "v1_completions": {"choices": []},
}


async def pushed(answers, models, sink=VllmWeightSink):
    script = Script(**answers)
    async with sink("http://h:1", model="policy", config=QUICK, transport=script) as made:
        try:
            return await made.push(WeightUpdate("full", str(models / "new"), "v9")), script.asked
        except SyncError as error:
            return error, script.asked


async def test_the_order_is_pause_reload_reset_version_check_resume_generate(models):
    version, asked = await pushed(GOOD, models)
    assert version == "v9"
    assert asked == [
        "/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/weight_info", "/resume",
        "/v1/completions",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_info": {"weight_version": "v8"}}, "reports another weight version.*got v8"),
        ({"collective_rpc": ServerUnreachableError("gone")}, "failed half-way.*gone"),
        ({"reset_prefix_cache": b'{"success":false}'}, "prefix cache was not reset"),
        ({"v1_completions": ServerUnreachableError("dead engine")}, "does not generate after the update.*dead engine"),
    ],
    ids=["wrong version", "reload fails", "cache held", "generation dead"],
)
async def test_whatever_fails_the_server_is_resumed_and_the_push_is_not_confirmed(models, change, message, monkeypatch):
    monkeypatch.setattr("topkd.clients.weights.sinks._RESET_PAUSE_S", 0.0)
    error, asked = await pushed(GOOD | change, models)
    assert isinstance(error, SyncError)
    assert "/resume" in asked
    with pytest.raises(SyncError, match=message):
        raise error


async def test_a_cancelled_push_still_resumes(models):
    script = Script(**GOOD)
    answer = script.send

    async def slow(request):
        if "collective_rpc" in request.url:
            script.asked.append("reloading")
            await asyncio.sleep(30)
        return await answer(request)

    script.send = slow
    async with VllmWeightSink("http://h:1", model="policy", config=QUICK, transport=script) as sink:
        task = asyncio.create_task(sink.push(WeightUpdate("full", str(models / "new"), "v9")))
        while "reloading" not in script.asked:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert script.asked[-1] == "/resume"


async def test_sglang_reloads_from_disk_between_pause_and_continue(models):
    answers = {
        "pause_generation": {},
        "update_weights_from_disk": {"success": 1, "message": ""},
        "model_info": {"weight_version": "v9"},
        "continue_generation": {},
        "generate": {},
    }
    version, asked = await pushed(answers, models, SglangWeightSink)
    assert version == "v9"
    assert asked[:4] == ["/pause_generation", "/update_weights_from_disk", "/model_info", "/continue_generation"]
    error, asked = await pushed(
        answers | {"update_weights_from_disk": b'{"success":false,"message":"no such path"}'}, models, SglangWeightSink
    )
    assert "no such path" in str(error)
    assert "/continue_generation" in asked


async def test_an_sglang_reload_is_confirmed_and_every_sample_names_its_version(models):
    """The documented dialect, as the embedded server speaks it."""
    config = ServeConfig(model=str(models / "old"), served_model_name="policy", port=0, dialect="sglang", device="cpu")
    with ServerProcess(config) as running:
        async with SglangWeightSink(running.url, config=QUICK, reference=str(models / "old")) as sink:
            assert await sink.push(WeightUpdate("full", str(models / "new"), "step-4")) == "step-4"
        async with Sglang(running.url, config=QUICK) as client:
            (rollout,) = await client.sample(PROMPT, 1, SamplingParams(max_tokens=6, seed=1))
    rows = reference(models / "new", [*PROMPT, *rollout.completion_ids.tolist()])[len(PROMPT) - 1 : -1]
    assert np.abs(rows[np.arange(len(rows)), rollout.completion_ids] - rollout.logp).max() < 1e-3
    assert rollout.version == "step-4"
