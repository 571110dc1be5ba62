"""Scoring on Ray: the store of one process, whatever becomes of the workers; and the parts that need no cluster."""

import json
import pickle
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.compose.bulk.test_score import keys, sent_tokens, written
from tests.engine.pieces import model_folder
from topkd.compose.bulk.config import ScoreConfig, ScoreReport
from topkd.compose.bulk.job import Claim
from topkd.compose.bulk.ray_runner import Ledger
from topkd.compose.data.files import UNIT, RowChunk, group_chunks
from topkd.compose.data.sequences import ScoreInput, iter_chunks, read_sequences
from topkd.compose.score import score
from topkd.offline import ScoreStore, verify
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import ConfigError, DataError

ROWS = [
    {"prompt_ids": [5 + i % 250, i // 250 + 5, 9], "completion_ids": [40 + j % 200 for j in range(30 + i % 9)]}
    for i in range(900)
]
AGAIN = [{**row, "id": "again"} for row in ROWS[:40]]  # equal rows in portions far from each other


def config(data, out, url="http://127.0.0.1:1", **changes):
    return ScoreConfig(**{"data": data, "out": out, "teachers": (url,), **changes})


def test_portions_of_every_source_hold_each_row_once_and_in_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt_ids": [1, i % 99], "completion_ids": [2 + i % 7] * (1 + i % 3)} for i in range(300)]
    lines = [json.dumps(row) for row in rows]
    lines[70:70] = ["", "  ", "{"]  # blank lines are no rows, a broken one is
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(str(tmp_path / "d.parquet"), batch_size=77)
    data.save_to_disk(str(tmp_path / "folder"))
    written(tmp_path / "d.jsonl", lines)
    for name, expected in (("d.jsonl", 301), ("d.parquet", 300), ("folder", 300)):
        source = tmp_path / name
        whole = list(read_sequences(source))
        assert len(whole) == expected
        for limit in (None, 100, UNIT, 1000):
            portions = group_chunks(iter_chunks(source), workers=2, limit=limit)
            parts = [item for portion in portions for item in read_sequences(source, None, portion)]
            assert [item.number for item in parts] == [item.number for item in whole][: limit or expected]
            same = zip(parts, whole, strict=False)
            assert all(a.ids.tolist() == b.ids.tolist() for a, b in same if isinstance(a, ScoreInput))
            assert sum(portion.rows for portion in portions) == min(limit or expected, expected)


def test_portions_are_large_for_large_files_and_small_enough_for_every_worker():
    def cut(rows, workers):
        return group_chunks((RowChunk(first, UNIT) for first in range(0, rows, UNIT)), workers=workers)

    assert {portion.rows for portion in cut(1_000_000, 4)[:-1]} == {16 * UNIT}
    assert len(cut(16 * UNIT, 4)) == 16
    assert cut(0, 4) == []


def test_the_ledger_gives_a_sequence_to_one_portion_and_never_more_than_the_cap(tmp_path):
    ledger = Ledger(config("d", tmp_path, max_tokens=30))
    assert ledger.claim(0, [(b"a", 10), (b"b", 10)]) == [Claim.ASK, Claim.ASK]
    assert ledger.claim(64, [(b"a", 10), (b"c", 5)]) == [Claim.ELSEWHERE, Claim.ASK]
    # A portion that is done anew keeps its claim, and what it sends again is counted again.
    assert ledger.claim(0, [(b"a", 10)]) == [Claim.CAP]
    assert ledger.claim(64, [(b"d", 1)]) == [Claim.CAP]


def test_what_workers_are_sent_and_send_back_survives_pickling(tmp_path):
    made = config("d", tmp_path, api_key="secret", client={"max_retries": 3})
    back = pickle.loads(pickle.dumps(made))
    assert back == made
    assert back.api_key.get_secret_value() == "secret"
    assert "secret" not in repr(back)
    report = ScoreReport("out", rows=2, refused=1, stopped="max_tokens = 3")
    report.add_failure(9, DataError("bad", where="d:9"))
    total = ScoreReport("out", rows=5)
    total.add_failure(30, DataError("bad", where="d:30"))
    total.add(pickle.loads(pickle.dumps(report)))
    assert (total.rows, total.refused, total.reasons["bad"], total.complete) == (7, 1, 2, False)
    assert [refusal["row"] for refusal in total.refusals] == [9, 30]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = model_folder(tmp_path_factory.mktemp("models") / "teacher", seed=2)
    # One sequence a forward pass: how many share one depends on the moment, and with it a row's last digit.
    options = {"served_model_name": "teacher", "port": 0, "max_logprobs": 20, "device": "cpu", "max_batch_tokens": 1}
    with ServerProcess(ServeConfig(model=str(model), **options)) as running:
        yield running


def scoring_workers(pid):
    """Process ids of the actors that score, among a process's descendants."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "MapWorker(MapBatches(ScoreWorker))" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def contents(cache):
    with ScoreStore(cache) as store:
        return {record.header.key: bytes(record.payload) for record in store.records(live=False)}


async def test_the_driver_of_a_ray_job_loads_no_tokenizer(tmp_path, monkeypatch):
    async def count_nothing(config, progress):
        return ScoreReport(str(config.out))

    monkeypatch.setattr("topkd.compose.bulk.ray_runner.score_on_ray", count_nothing)
    data = written(tmp_path / "d.jsonl", [json.dumps(ROWS[0])])
    report = await score(config(data, tmp_path / "out", runner="ray", tokenizer=str(tmp_path / "missing")))
    assert report.rows == 0


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
async def test_a_cluster_that_nobody_answers_for_is_said_at_once_and_not_waited_for(tmp_path, address):
    pytest.importorskip("ray")
    data = written(tmp_path / "d.jsonl", ROWS[:3])
    with pytest.raises(ConfigError, match=rf"cannot join the Ray cluster \({address}\): got .*refused") as caught:
        await score(config(data, tmp_path / "cache", runner="ray", ray_address=address))
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_a_killed_worker_on_a_ray_cluster_leaves_the_store_of_a_single_process(server, tmp_path):
    pytest.importorskip("ray")
    data, out = written(tmp_path / "data.jsonl", [*ROWS, *AGAIN, "{"]), tmp_path / "cache"
    topkd = [sys.executable, "-m", "topkd", "score", data, "--teacher", server.url, "--in-flight", "4", "--json"]
    command = [*topkd, "--out", out, "--runner", "ray", "--workers", "2"]
    child = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while sum(file.stat().st_size for file in out.glob("seg-*.tkl")) < 200_000:
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline, "no score was written"
        time.sleep(0.05)
    victim = scoring_workers(child.pid)[0]
    victim.send_signal(signal.SIGKILL)
    kept = len(keys(out))
    assert 0 < kept < len(ROWS), "killed too late or too early to show anything"
    stdout, stderr = child.communicate(timeout=240)
    assert child.returncode == 1, stderr  # the broken row
    assert stdout, stderr
    report = json.loads(stdout)
    assert (report["refused"], report["failed"], report["refusals"][0]["row"]) == (1, 0, len(ROWS) + len(AGAIN) + 1)
    assert report["rows"] == len(ROWS) + len(AGAIN) + 1
    assert report["scored"] + report["cached"] == len(ROWS) + len(AGAIN)
    single = subprocess.run(
        [*map(str, [*topkd, "--out", tmp_path / "single"])], capture_output=True, text=True, check=False
    )
    assert json.loads(single.stdout)["scored"] == len(ROWS)
    assert contents(out) == contents(tmp_path / "single")
    assert len(keys(out)) == len(ROWS), "something is there twice, or is missing"
    checked = verify(out)
    assert checked.ok
    assert checked.duplicates == 0
    assert all(path.with_suffix(".idx").exists() for path in out.glob("seg-*.tkl"))
    before = sent_tokens(server)
    again = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert json.loads(again.stdout)["scored"] == 0
    assert sent_tokens(server) == before
