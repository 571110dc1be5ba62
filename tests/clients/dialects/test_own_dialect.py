"""The page "Add a dialect", followed to its end: its code runs, and every reader of dialects knows the new one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.probing import served
from tests.clients.toy import VOCAB, Toy
from topkd.clients import ClientConfig, Fleet, connect
from topkd.clients.connection import open_client
from topkd.clients.dialects import records
from topkd.clients.dialects.records import DIALECTS, find_dialect, list_dialects
from topkd.clients.probe.probe import probe
from topkd.topk.errors import KLimitError, ResponseError, UnsupportedError
from topkd.topk.samples import SamplingParams

ROOT = Path(__file__).parents[3]
MODULE, RECORD = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/add-a-dialect.md").read_text(), re.DOTALL)
RECORD = RECORD.replace("topkd.clients.dialects.acme", "acme")
FAST = ClientConfig(max_retries=1, backoff_s=0.01)
TOY = Toy(seed=3)
IDS = [1, 4, 2, 7, 7, 0, 3]


def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
    """An Acme server."""
    if path == "/v1/models":
        return 200, {"data": [{"id": "t", "max_model_len": 64}]}
    if path != "/score":
        return 404, {"error": {"message": "no such route"}}
    if method == "GET":
        return 405, {"error": {"message": "POST only"}}
    assert set(body) == {"model", "ids", "first", "top"}
    rows = []
    for place in range(body["first"], len(body["ids"]) - 1):
        logp = TOY.logp[body["ids"][place]]
        top = [list(entry) for entry in TOY.top(logp, body["top"])]
        rows.append({"logprob": float(logp[body["ids"][place + 1]]), "top": top})
    return 200, {"rows": rows}


@pytest.fixture(autouse=True)
def _acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "acme.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    added = eval(RECORD, vars(records))
    former = dict(DIALECTS)
    DIALECTS.clear()
    DIALECTS.update({"acme": added, **former})
    yield
    DIALECTS.clear()
    DIALECTS.update(former)
    sys.modules.pop("acme", None)


async def test_the_client_scores_and_refuses_what_the_dialect_cannot_do():
    with served(answer) as url:
        async with await connect(url, dialect="acme", model="t", config=FAST) as teacher:
            topk = await teacher.score(IDS, 2, 5)
            for row, place in enumerate(range(2, len(IDS) - 1)):
                logp = TOY.logp[IDS[place]]
                np.testing.assert_allclose(topk.logp[row], np.sort(logp)[::-1][:5], atol=1e-6)
                np.testing.assert_allclose(topk.actual_logp[row], logp[IDS[place + 1]], atol=1e-6)
            with pytest.raises(KLimitError, match="K = 9 is above the limit of the acme dialect"):
                await teacher.score(IDS, 2, 9)
            with pytest.raises(UnsupportedError, match="cannot sample"):
                await teacher.sample(IDS, 1, SamplingParams(2))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows.pop(),
        lambda rows: rows[1]["top"].pop(),
        lambda rows: rows[0]["top"][0].__setitem__(0, VOCAB),
        lambda rows: rows[0].__setitem__("logprob", 0.5),
        lambda rows: rows[0].__setitem__("logprob", None),
    ],
    ids=["a row short", "an entry short", "outside the vocabulary", "above 0", "null"],
)
async def test_a_reply_that_cannot_be_right_is_refused(spoil: Any):
    def broken(method: str, path: str, body: Any) -> tuple[int, Any]:
        status, reply = answer(method, path, body)
        if "rows" in reply:
            spoil(reply["rows"])
        return status, reply

    with served(broken) as url:
        async with await connect(url, dialect="acme", model="t", vocab_size=VOCAB, config=FAST) as teacher:
            with pytest.raises(ResponseError):
                await teacher.score(IDS, 2, 5)


async def test_auto_finds_it_and_replicas_of_it_are_a_fleet():
    with served(answer) as url, served(answer) as other:
        async with await open_client(url, config=FAST) as client:
            assert client.dialect == "acme"
        async with await connect([url, other], dialect="acme", config=FAST) as fleet:
            assert isinstance(fleet, Fleet)
            assert (await fleet.score(IDS, 2, 5)).k == 5


async def test_the_probe_asks_its_default_questions():
    with served(answer) as url:
        report = await probe(url, dialect="auto", model="t", config=FAST)
    assert (report.dialect, report.can_teach, report.capabilities.score_k) == ("acme", True, 8)
    assert report["realised_token"].status == "ok"
    assert report["alignment"].value == "not made"


def test_run_files_and_the_forecast_know_it():
    from topkd.compose.config.tables import TeacherConfig

    assert "acme" in list_dialects(scores=True)
    assert "acme" not in list_dialects(samples=True, chats=True)
    assert TeacherConfig(url="http://127.0.0.1:1", dialect="acme").dialect == "acme"
    assert find_dialect("acme").reply.size(10, 5, 8) == 5 * (24 + 8 * 22)


def test_the_command_line_knows_it(tmp_path: Path):
    program = f"""
import sys
from topkd.clients.dialects import records
added = eval({RECORD!r}, vars(records))
former = dict(records.DIALECTS)
records.DIALECTS.clear()
records.DIALECTS.update({{"acme": added, **former}})
sys.path.insert(0, {str(tmp_path)!r})
from topkd.cli.commands import probe, score
assert "acme" in probe.DIALECTS and "acme" in score.DIALECTS
from topkd.cli.app import main
sys.argv = ["topkd", "probe", sys.argv[1], "--dialect", "acme", "--json"]
main()
"""
    with served(answer) as url:
        done = subprocess.run(
            [sys.executable, "-c", program, url], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dialect"] == "acme"
