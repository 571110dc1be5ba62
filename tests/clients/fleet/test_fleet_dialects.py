"""Fleets of every scoring dialect: one client a replica, detected one by one, seen to agree before they are used."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from tests.clients.dialects import test_fireworks as fireworks
from tests.clients.dialects import test_sglang as sglang
from tests.clients.probing import served
from tests.clients.toy import VOCAB, Toy, Wire
from tests.clients.vllm_toy import VllmToy
from topkd.clients import ClientConfig, Fleet, Sglang, VllmCompletions, VllmGenerate, connect
from topkd.clients.dialects.fireworks import FireworksEcho
from topkd.clients.http.transport import Reply, Request
from topkd.topk.errors import ConfigError, ResponseError, ServerUnreachableError, UnsupportedError
from topkd.topk.protocols import CandidateScorer, Sampler, TeacherScorer
from topkd.topk.samples import SamplingParams

QUICK = ClientConfig(max_retries=2, backoff_s=0.0, breaker_failures=1)
IDS = np.random.default_rng(12).integers(0, VOCAB, 14).tolist()
MODELS = {"object": "list", "data": [{"id": "t", "max_model_len": 4096}]}


class Hosts:
    """A transport that knows a server for each host; one that is down answers nobody."""

    def __init__(self, **wires: Wire) -> None:
        self.wires, self.down, self.asked = wires, set[str](), list[str]()

    async def send(self, request: Request) -> Reply:
        host = request.url.split("://", 1)[1].partition("/")[0]
        self.asked.append(host)
        if host in self.down:
            raise ServerUnreachableError("no connection", where=request.url)
        if request.url.endswith("/v1/models"):
            return Reply(200, {}, json.dumps(MODELS).encode(), request.url)
        if request.method == "GET" and not request.url.endswith("/health"):
            return Reply(404, {}, b'{"detail":"Not Found"}', request.url)
        return await self.wires[host].send(request)

    async def aclose(self) -> None:
        pass


def seeded(module: Any, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Wire:
    """The module's server, speaking for ``toy``."""
    monkeypatch.setattr(module, "TOY", toy)
    return module.server()


async def test_a_fleet_of_sglang_servers_scores_samples_and_fails_over(monkeypatch: pytest.MonkeyPatch):
    toy = Toy(seed=2)
    hosts = Hosts(a=sglang.server(), b=sglang.server())
    async with Fleet(["http://a", "http://b"], make=Sglang, model="t", config=QUICK, transport=hosts) as fleet:
        assert isinstance(fleet, TeacherScorer)
        assert isinstance(fleet, CandidateScorer)
        assert isinstance(fleet, Sampler)
        assert await fleet.agreement(IDS, 4, 3) == 0.0
        hosts.down.add("a")
        for _ in range(4):
            topk = await fleet.score(IDS, 4, 3)
            rows = toy.rows(IDS)[4:]
            np.testing.assert_allclose(topk.actual_logp, rows[np.arange(len(rows)), IDS[5:]], atol=1e-6)
        [rollout] = await fleet.sample(IDS[:4], 1, SamplingParams(3))
        assert rollout.version == "step-3"
        wanted = topk.ids
        np.testing.assert_allclose(await fleet.score_candidates(IDS, 4, wanted), topk.logp, atol=1e-6)
        assert fleet.metrics["replica_0_closed"] == 0.0


async def test_replicas_of_two_dialects_are_one_teacher_when_they_agree_and_none_when_not(
    monkeypatch: pytest.MonkeyPatch,
):
    urls, makes = ["http://a", "http://b"], [Sglang, FireworksEcho]
    hosts = Hosts(a=sglang.server(), b=seeded(fireworks, Toy(seed=2), monkeypatch))
    async with Fleet(urls, make=makes, model="t", config=QUICK, transport=hosts) as fleet:
        info = await fleet.check_replicas()
        assert (info.model, info.max_model_len) == ("t", 4096)
        assert (await fleet.score(IDS, 4, 3)).k == 3
    monkeypatch.setattr(fireworks, "TOY", Toy(seed=7))
    hosts = Hosts(a=sglang.server(), b=fireworks.server())
    async with Fleet(urls, make=makes, model="t", config=QUICK, transport=hosts) as fleet:
        with pytest.raises(ResponseError, match=r"replicas disagree \(http://\w and http://\w"):
            await fleet.check_replicas()


async def test_a_hosted_replica_without_a_health_route_closes_its_circuit_again(monkeypatch: pytest.MonkeyPatch):
    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        return (404, {"error": "not found"}) if path == "/health" else wire.handler(method, path, body)

    wire = seeded(fireworks, Toy(seed=2), monkeypatch)
    hosts = Hosts(a=Wire(handler))
    config = QUICK.model_copy(update={"breaker_cooldown_s": 0.01, "max_retries": 8, "backoff_s": 0.02})
    async with Fleet(["http://a"], make=FireworksEcho, model="m", config=config, transport=hosts) as fleet:
        hosts.down.add("a")
        lost = asyncio.create_task(fleet.score(IDS, 4, 3))
        while not fleet.metrics.get("circuits_opened"):
            await asyncio.sleep(0.001)
        hosts.down.clear()
        assert (await asyncio.wait_for(lost, 240)).rows == len(IDS) - 5
        assert fleet.metrics["replica_0_closed"] == 1.0


async def test_candidates_are_refused_by_name_where_the_dialect_has_none(monkeypatch: pytest.MonkeyPatch):
    hosts = Hosts(a=seeded(fireworks, Toy(seed=2), monkeypatch))
    async with Fleet(["http://a"], make=FireworksEcho, model="m", config=QUICK, transport=hosts) as fleet:
        with pytest.raises(UnsupportedError, match="scores no candidates"):
            await fleet.score_candidates(IDS, 4, np.zeros((len(IDS) - 5, 2), np.int32))
    assert hosts.asked == [], "nothing was sent"


async def test_zeros_on_both_sides_agree_and_hide_no_other_difference():
    same, other = Toy(seed=2), Toy(seed=2)
    for toy in (same, other):
        toy.logp[IDS[5], IDS[6]] = -9999.0
    other.logp[IDS[8], IDS[9]] -= 0.1
    hosts = Hosts(a=Wire(VllmToy(same)), b=Wire(VllmToy(same)), c=Wire(VllmToy(other)))
    async with Fleet(["http://a", "http://b"], model="t", config=QUICK, transport=hosts) as fleet:
        assert await fleet.agreement(IDS, 0, 0) == 0.0
    async with Fleet(["http://a", "http://c"], model="t", config=QUICK, transport=hosts) as fleet:
        with pytest.raises(ResponseError, match=r"row 8.*0\.1 nats apart"):
            await fleet.agreement(IDS, 0, 0)


def _behind_models(wire: Any) -> Any:
    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if method == "GET":
            return (200, MODELS) if path == "/v1/models" else (404, {"detail": "Not Found"})
        return wire.handler(method, path, body)

    return handler


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(
    ("dialect", "server"),
    [
        ("vllm", VllmToy),
        ("vllm_generate", VllmToy),
        ("sglang", lambda: _behind_models(sglang.server())),
        ("fireworks", lambda: _behind_models(fireworks.server())),
    ],
)
async def test_a_teacher_told_its_size_refuses_ids_past_it_in_requests_and_replies(
    dialect: str, server: Any, replicas: int
):
    options: Any = {"dialect": dialect, "model": "t", "config": QUICK}
    few = np.arange(1, 9)  # the toys list ids of all 120 after these
    with served(server()) as a, served(server()) as b:
        url = a if replicas == 1 else [a, b]
        for size in (None, VOCAB):
            async with await connect(url, vocab_size=size, **options) as teacher:
                assert int((await teacher.score(few, 0, 5)).ids.max()) >= 9
        with pytest.raises(ResponseError, match=r"id outside the vocabulary.*expected below 9"):
            async with await connect(url, vocab_size=9, **options) as teacher:
                await teacher.score(few, 0, 5)
        async with await connect(url, vocab_size=VOCAB, **options) as teacher:
            with pytest.raises(ConfigError, match=r"outside the vocabulary.*got 120"):
                await teacher.score([1, VOCAB], 0, 5)


async def test_connect_to_several_urls_is_a_fleet_that_was_seen_to_agree():
    with served(VllmToy(generate=False)) as a, served(VllmToy()) as b:
        async with await connect([a, b], dialect="auto") as fleet:
            assert isinstance(fleet, Fleet)
            assert [type(replica.client) for replica in fleet.replicas] == [VllmCompletions, VllmGenerate]
            assert (await fleet.score(IDS, 4, 3)).rows == len(IDS) - 5
        with served(VllmToy(toy=Toy(seed=99))) as other, pytest.raises(ResponseError, match="replicas disagree"):
            await connect([a, other])
    with pytest.raises(ConfigError, match="distinct"):
        await connect([])
