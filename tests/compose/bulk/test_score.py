"""Bulk scoring over a real server: every row once, whatever stops the job, within its caps, and every bad row named."""

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from tests.engine.pieces import model_folder
from tests.fakes.interrupts import interruptible
from topkd.clients import connect
from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.sequences import read_sequences
from topkd.compose.progress import Progress
from topkd.compose.replay import replay
from topkd.compose.score import ScoreConfig, score
from topkd.engine.loop.metrics import read_metrics
from topkd.offline import ScoreStore, TeacherIdentity, merge, verify
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import ConfigError, DataError, KLimitError, ServerUnreachableError

ROWS = [
    {"prompt_ids": [5 + i % 50, 9, i % 200], "completion_ids": [40 + j for j in range(i % 5 + 2)]} for i in range(60)
]
TOKENS = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in ROWS]
TEACHER = TeacherIdentity("teacher")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "teacher", seed=2)


@pytest.fixture(scope="module")
def server(model):
    config = ServeConfig(model=str(model), served_model_name="teacher", port=0, max_logprobs=20, device="cpu")
    with ServerProcess(config) as running:
        yield running


def written(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def config(server, tmp_path):
    data = written(tmp_path / "data.jsonl", ROWS)

    def make(**changes):
        return ScoreConfig(**{"data": data, "out": tmp_path / "cache", "teachers": (server.url,), **changes})

    return make


def fetched(server, path):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{server.url}{path}") as reply:
        return reply.read().decode()


def sent_tokens(server):
    lines = fetched(server, "/metrics").splitlines()
    return float(next(line for line in lines if line.startswith("vllm:prompt_tokens_total")).split()[-1])


def under_way(server):
    return json.loads(fetched(server, "/load"))["server_load"]


def keys(cache):
    with ScoreStore(cache) as store:
        return sorted(record.header.key for record in store.records(live=False))


async def test_every_row_is_scored_once_with_the_teachers_own_numbers(config, server):
    before = sent_tokens(server)
    report = await score(config())
    assert (report.rows, report.scored, report.cached, report.refused, report.failed) == (60, 60, 0, 0, 0)
    assert report.complete
    assert sent_tokens(server) - before == sum(TOKENS)
    assert report.tokens_sent == sum(TOKENS) + 60  # each request generates one token
    assert report.positions == sum(len(row["completion_ids"]) for row in ROWS)
    async with await connect(server.url) as teacher:
        with ScoreStore(config().out) as store:
            for row in ROWS[:5]:
                ids, start = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"]) - 1
                live, kept = await teacher.score(ids, start, 20), store.get(TEACHER, ids, start, 20)
                assert np.array_equal(live.ids, kept.ids)
                np.testing.assert_allclose(live.actual_logp, kept.actual_logp, atol=1e-5)
                np.testing.assert_allclose(live.logp, kept.logp, rtol=1e-3)


async def test_what_is_stored_costs_nothing_and_a_narrower_k_is_stored(config, server):
    await score(config(k=8, limit=20))
    before = sent_tokens(server)
    again = await score(config(k=4, limit=20))
    assert sent_tokens(server) == before
    assert (again.scored, again.cached, again.tokens_sent) == (0, 20, 0)
    assert again.saved_tokens == sum(TOKENS[:20]) + 20, "each request also generates a token"
    wider = await score(config(k=9, limit=20))
    assert (wider.scored, wider.cached) == (20, 0)
    other = await score(config(k=4, limit=20, revision="v2"))
    assert (other.scored, other.cached) == (20, 0)


async def test_limit_then_the_rest(config):
    first = await score(config(limit=25))
    rest = await score(config())
    assert (first.rows, first.scored) == (25, 25)
    assert (rest.rows, rest.scored, rest.cached) == (60, 35, 25)


async def test_the_union_of_the_shards_is_the_whole(config, tmp_path):
    await score(config())
    parts = []
    for i in (1, 2, 3):
        parts.append(tmp_path / f"part-{i}")
        report = await score(config(shard=(i, 3), out=parts[-1]))
        assert report.scored == 20
    merge(parts, tmp_path / "merged")
    assert keys(tmp_path / "merged") == keys(tmp_path / "cache")
    assert sum(len(keys(part)) for part in parts) == 60


@pytest.mark.parametrize("shards", [1, 3])
async def test_dedupe_skips_equal_rows_across_shards_too(config, tmp_path, server, shards):
    data = written(tmp_path / "twice.jsonl", [*ROWS[:20], *ROWS[:20], *ROWS[5:10]])
    before = sent_tokens(server)
    reports = [
        await score(config(data=data, dedupe=True, shard=(i, shards), out=tmp_path / f"d{i}"))
        for i in range(1, shards + 1)
    ]
    assert sum(report.scored for report in reports) == 20
    assert sum(report.duplicates for report in reports) == 25
    assert sent_tokens(server) - before == sum(TOKENS[:20])


async def test_equal_rows_are_asked_once_also_without_dedupe(config, tmp_path, server):
    before = sent_tokens(server)
    report = await score(config(data=written(tmp_path / "twice.jsonl", [*ROWS[:20]] * 3)))
    assert (report.rows, report.scored, report.cached) == (60, 20, 40)
    assert sent_tokens(server) - before == sum(TOKENS[:20])


@pytest.mark.parametrize(
    ("caps", "tokens"),
    [({"max_tokens": 100}, 100), ({"max_cost": 0.0002, "price_per_million": 2.0}, 100)],
    ids=["tokens", "cost"],
)
async def test_a_cap_is_never_crossed_and_the_job_goes_on_from_there(config, server, caps, tokens):
    before = sent_tokens(server)
    report = await score(config(**caps))
    assert report.stopped.startswith(next(iter(caps)))
    assert not report.complete
    assert report.tokens_sent <= tokens < report.tokens_sent + max(TOKENS) + 1
    assert sent_tokens(server) - before <= tokens
    rest = await score(config())
    assert rest.cached == report.scored
    assert rest.scored == 60 - report.scored
    # What is cached takes nothing from a cap.
    assert (await score(config(max_tokens=1))).complete


async def test_an_estimate_asks_nothing_and_foretells_the_bill(config, server, tmp_path):
    before = sent_tokens(server)
    dead = config(teachers=("http://127.0.0.1:1",), estimate=True, price_per_million=3.0)
    forecast = await score(dead)
    assert not (tmp_path / "cache").exists()
    assert sent_tokens(server) == before
    report = await score(config(price_per_million=3.0, limit=30))
    left = await score(config(estimate=True))
    assert (left.scored, left.cached) == (30, 30)
    rest = await score(config(price_per_million=3.0))
    assert forecast.tokens_sent == report.tokens_sent + rest.tokens_sent
    assert forecast.cost == pytest.approx(report.cost + rest.cost)


async def test_bad_rows_are_refused_with_their_line_and_the_rest_is_scored(config, tmp_path, server):
    good = ROWS[0]
    bad = {
        2: ("{", "not a JSON object"),
        3: ('"text"', "not a JSON object"),
        4: ({"prompt_ids": [1]}, "not a row that can be scored"),
        5: ({"prompt_ids": [1], "completion": "x"}, "not a row that can be scored"),
        6: ({"prompt_ids": [1], "completion_ids": []}, "a completion needs at least one token"),
        7: ({"prompt_ids": [], "completion_ids": [1]}, "a prompt needs at least one token"),
        8: ({"prompt_ids": [1.5], "completion_ids": [1]}, "cannot be read"),
        9: ({"prompt_ids": [1], "completion_ids": [2**31]}, "a token id is out of range"),
        10: ({"prompt_ids": [1], "completion_ids": [-1]}, "no negative id"),
        11: (
            {**good, "teacher_id": "b"},
            "got 'b', expected a row that names no teacher; add --teacher-id b",
        ),
        12: ({**good, "logp": [-1.0]}, "logp must be one log-probability"),
        13: ({**good, "feedback": "psst"}, "the template of feedback contains the text of a prompt"),
        14: ({"prompt_ids": [1] * 5000, "completion_ids": [2]}, "longer than the server's context"),
        15: ({"prompt_ids": [1], "completion_ids": [900]}, "refuses the request"),
        16: ({"messages": [{"role": "user", "content": "a"}]}, "two or more messages"),
    }
    tokenizer = server.config.model
    data = written(tmp_path / "mixed.jsonl", [good, *(row for row, _ in bad.values()), "", ROWS[1]])
    report = await score(config(data=data, tokenizer=tokenizer))
    assert (report.scored, report.refused, report.failed) == (2, len(bad), 0)
    told = {refusal["row"]: refusal["reason"] for refusal in report.refusals}
    assert told.keys() == bad.keys()
    for line, (_, words) in bad.items():
        assert words in told[line]
        assert line == 15 or f"mixed.jsonl:{line}" in told[line]
    with pytest.raises(DataError, match=r"mixed\.jsonl:2"):
        await score(config(data=data, tokenizer=tokenizer, strict=True))
    with pytest.raises(ConfigError, match="need a tokenizer"):
        await score(config(data=written(tmp_path / "text.jsonl", [{"prompt": "a", "completion": "b"}])))


def test_text_messages_and_ids_become_the_sequence_that_was_meant(model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "return"}]
    rows = [
        {"prompt": "import", "completion": " os"},
        {"messages": messages},
        {"messages": messages, "hint": "be brief"},
    ]
    text, chat, hinted = read_sequences(written(tmp_path / "d.jsonl", rows), tokenizer)

    def halves(item):
        return tuple(tokenizer.decode(part) for part in (item.ids[: item.start + 1], item.ids[item.start + 1 :]))

    assert halves(text) == ("import", " os")
    prompt = "<|im_start|>user\nimport os<|im_end|>\n<|im_start|>assistant\n"
    assert halves(chat) == (prompt, "return<|im_end|>")  # the token that ends it, and not the line break after it
    assert halves(hinted) == (f"<|im_start|>system\nbe brief<|im_end|>\n{prompt}", "return<|im_end|>")


def test_parquet_and_dataset_folders_hold_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "id": str(i), "hint": None} for i, row in enumerate(ROWS)]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(str(tmp_path / "d.parquet"))
    data.save_to_disk(str(tmp_path / "folder"))
    lines = list(read_sequences(written(tmp_path / "d.jsonl", rows)))
    for other in ("d.parquet", "folder"):
        found = list(read_sequences(tmp_path / other))
        assert [(i.ids.tolist(), i.start, i.sample_id) for i in found] == [
            (i.ids.tolist(), i.start, i.sample_id) for i in lines
        ]
        assert [item.number for item in found] == list(range(60))
    written(tmp_path / "no.parquet", ["not parquet"])
    for path in ("no.parquet", "."):
        with pytest.raises(DataError):
            list(read_sequences(tmp_path / path))


async def test_given_logprobs_travel_into_the_cache_and_train_off_policy(config, tmp_path, model):
    rows = [{**row, "logp": [-2.5] * len(row["completion_ids"])} for row in ROWS]
    data = written(tmp_path / "sampled.jsonl", rows)
    assert (await score(config(data=data))).scored == 60
    values = {
        "steps": 3,
        "student": {"model": str(model_folder(tmp_path / "student", seed=1)), "device": "cpu"},
        "teacher": {"url": "http://127.0.0.1:1"},
        "data": {"path": str(data)},
        "rollout": {"prompts_per_step": 20, "samples_per_prompt": 1},
        "replay": {"order": "shuffled"},
    }
    result = await replay(RunConfig.model_validate(values), tmp_path / "run", cache=tmp_path / "cache")
    assert sum(record["tokens"] for record in result.steps) == sum(len(row["completion_ids"]) for row in rows)
    assert all(record["behavior_kl_k3"] > 0.1 for record in read_metrics(tmp_path / "run" / "metrics.jsonl", "step"))
    # The cache's own rollouts are data too: all of them are scored already.
    again = await score(config(data=tmp_path / "cache"))
    assert (again.rows, again.scored, again.cached) == (60, 0, 60)


async def test_replicas_share_the_work_and_must_agree(config, server, model, tmp_path):
    other = server.url.replace("127.0.0.1", "localhost")
    before = sent_tokens(server)
    report = await score(config(teachers=(server.url, other)))
    assert (report.scored, report.failed) == (60, 0)
    assert sent_tokens(server) - before == sum(TOKENS) + 2 * 8, "compared once, on eight ids, when the job connects"
    with pytest.raises(ServerUnreachableError, match=r"127\.0\.0\.1:1"):
        await score(
            config(teachers=("http://127.0.0.1:1",), out=tmp_path / "x", client={"max_retries": 1, "backoff_s": 0.01})
        )


async def test_trouble_that_every_row_has_ends_the_job_at_once(config, server):
    before = sent_tokens(server)
    with pytest.raises(KLimitError, match="21"):
        await score(config(k=21))
    assert sent_tokens(server) == before


async def test_a_cancelled_job_keeps_what_it_has_and_says_how_to_go_on(config, tmp_path):
    said = []

    class Stop(Progress):
        def note(self, text):
            said.append(text)

        def advance(self, done, detail=""):
            if done >= 10:
                task.cancel()

    task = asyncio.create_task(score(config(in_flight=2), Stop()))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert any("run the same command again" in text for text in said)
    kept = len(keys(tmp_path / "cache"))
    assert 10 <= kept < 60
    rest = await score(config())
    assert (rest.cached, rest.scored) == (kept, 60 - kept)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_job_that_is_killed_goes_on_without_asking_anything_twice(server, tmp_path, how):
    rows = [
        {"prompt_ids": [5 + i, 5, 9], "completion_ids": [40 + j % 200 for j in range(30 + i % 9)]} for i in range(250)
    ]
    data, out = written(tmp_path / "data.jsonl", rows), tmp_path / "cache"
    command = [sys.executable, "-m", "topkd", "score", data, "--teacher", server.url, "--out", out, "--in-flight", "4"]
    child = interruptible(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and sum(f.stat().st_size for f in out.glob("seg-*.tkl")) < 40_000:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    child.send_signal(how)
    stderr = child.communicate(timeout=240)[1]
    assert child.returncode != 0
    if how == signal.SIGINT:
        assert "run the same command again to continue" in stderr
        assert "Traceback" not in stderr
    kept = keys(out)
    assert 0 < len(kept) < len(rows), "killed too late or too early to show anything"
    while under_way(server):  # it finishes what the dead client had in flight
        time.sleep(0.02)
    before = sent_tokens(server)
    report = asyncio.run(score(ScoreConfig(data=data, out=out, teachers=(server.url,))))
    assert (report.cached, report.scored) == (len(kept), len(rows) - len(kept))
    asked = set(keys(out)) - set(kept)
    assert len(asked) == report.scored
    assert sent_tokens(server) - before == report.tokens_sent - report.scored
    asyncio.run(score(ScoreConfig(data=data, out=tmp_path / "whole", teachers=(server.url,))))
    assert keys(out) == keys(tmp_path / "whole")
    assert verify(out).ok
