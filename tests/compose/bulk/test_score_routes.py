"""Several teachers in one job, and what a job's exit code says, over a real server."""

import pytest

from tests.cli.test_cache import ran
from tests.compose.bulk.test_score import ROWS, written
from tests.engine.pieces import model_folder
from topkd.clients import ClientConfig, connect
from topkd.compose.config.run_config import RunConfig
from topkd.compose.replay import replay
from topkd.compose.score import ScoreConfig, score
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.store.records import ROLLOUT
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = model_folder(tmp_path_factory.mktemp("models") / "teacher", seed=2)
    options = {"served_model_name": "teacher", "port": 0, "max_logprobs": 20, "device": "cpu"}
    with ServerProcess(ServeConfig(model=str(model), **options)) as running:
        yield running


@pytest.fixture
def config(server, tmp_path):
    return lambda **changes: ScoreConfig(
        **{"data": "none", "out": tmp_path / "cache", "teachers": (server.url,), **changes}
    )


async def test_rows_go_to_the_teacher_they_name_and_one_that_has_no_server_is_an_error(config, server, tmp_path):
    rows = [{**row, "teacher_id": ("maths", "code", "law")[i % 3]} for i, row in enumerate(ROWS[:30])]
    rows += [{**ROWS[0], "teacher_id": "code"}, ROWS[1]]  # maths' sequence, for another teacher; and nobody's
    data = written(tmp_path / "routed.jsonl", rows)
    routes = {"maths": (server.url,), "code": (server.url.replace("127.0.0.1", "localhost"),)}
    both = {"data": data, "teachers": (), "routes": routes, "revisions": {"maths": "m1", "code": "c1"}}
    report = await score(config(**both))
    assert (report.scored, report.refused, report.failed) == (21, 11, 0)
    assert "got 'law', expected one of 'maths', 'code'; give its server" in report.refusals[0]["reason"]
    assert report.refusals[-1]["row"] == 32
    with ScoreStore(config().out) as store:
        for row, others in ((rows[0], {"code": True}), (rows[3], {"code": False}), (rows[1], {"maths": False})):
            ids, start = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"]) - 1
            held = {name: store.covers(TeacherIdentity("teacher", revision=revision), ids, start, 20)
                    for name, revision in both["revisions"].items()}  # fmt: skip
            assert held == {row["teacher_id"]: True, **others}
    assert (await score(config(**both, estimate=True))).scored == 0
    with pytest.raises(DataError, match=r"routed\.jsonl:3"):
        await score(config(**both, strict=True))
    # With one teacher and a name, the rows of the others are simply not this job's.
    named = await score(config(data=data, teacher_id="code", revision="c1"))
    assert (named.rows, named.cached, named.skipped, named.refused) == (11, 11, 21, 0)


async def test_a_teacher_told_its_size_has_every_reply_past_it_refused_and_none_kept(config, tmp_path):
    rows = [{"prompt_ids": [1, 2, 3], "completion_ids": [4, 5]}, {"prompt_ids": [1, 6], "completion_ids": [4]}]
    data = written(tmp_path / "few.jsonl", rows)
    client = ClientConfig(max_retries=0, response_retries=0, backoff_s=0.0)
    small = config(data=data, vocab_size=6, client=client)
    report = await score(small)
    assert (report.scored, report.failed, report.refused) == (0, 1, 1)
    assert list(report.reasons) == ["a row has an id outside the teacher's vocabulary", "id outside the vocabulary"]
    assert "few.jsonl:2): got 6, expected below 6" in report.refusals[0]["reason"]
    assert (await score(small.model_copy(update={"estimate": True}))).refused == 1
    routes = {"maths": small.teachers}
    named = config(data=written(tmp_path / "m.jsonl", [{**rows[0], "teacher_id": "maths"}]), client=client,
                   teachers=(), routes=routes, vocab_size=4096, vocab_sizes={"maths": 6})  # fmt: skip
    assert (await score(named)).failed == 1, "the teacher's own size comes first"
    assert (await score(config(data=data, vocab_size=4096))).scored == 2, "a refused reply is not in the cache"


async def test_given_completions_are_kept_under_the_prompt_that_they_were_drawn_from(config, tmp_path):
    """And not under the teacher's, which says more: a replay would not find them, or weigh them against it."""
    rows = [
        {**row, "teacher_prompt_ids": [7, 8, *row["prompt_ids"]], "logp": [-2.5] * len(row["completion_ids"])}
        for row in ROWS[:12]
    ]
    data = written(tmp_path / "sampled.jsonl", rows)
    assert (await score(config(data=data))).scored == 12
    with ScoreStore(tmp_path / "cache") as store:
        kept = {tuple(one.prompt_ids) for record in store.records(kinds=(ROLLOUT,)) for one in record.rollouts()}
    assert kept == {tuple(row["prompt_ids"]) for row in rows}
    values = {
        "steps": 1,
        "student": {"model": str(model_folder(tmp_path / "student", seed=1)), "device": "cpu"},
        "teacher": {"url": "http://127.0.0.1:1"},
        "data": {"path": str(data)},
        "rollout": {"prompts_per_step": 12, "samples_per_prompt": 1},
        "replay": {"order": "shuffled"},
    }
    result = await replay(RunConfig.model_validate(values), tmp_path / "run", cache=tmp_path / "cache")
    assert result.steps[0]["tokens"] == sum(len(row["completion_ids"]) for row in rows)


def test_the_exit_code_says_whether_every_row_is_there(server, tmp_path):
    url = ["--teacher", server.url, "--out", tmp_path / "c"]
    good, bad = written(tmp_path / "good.jsonl", ROWS[:3]), written(tmp_path / "bad.jsonl", [*ROWS[:3], "{"])
    assert "3 rows: 3 scored" in ran("score", good, *url)
    text = ran("score", bad, *url, code=1)
    assert "1 refused" in text
    assert "row 4: not a JSON object" in text
    assert "column 2): got the end of the line" in text
    ran("score", bad, *url, "--estimate")
    assert "stopped at max_tokens = 5" in ran(
        "score", written(tmp_path / "m.jsonl", ROWS), *url, "--max-tokens", 5, code=1
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shard": (3, 2)}, "no shard 3 of 2"),
        ({"max_cost": 1.0}, "needs price_per_million"),
        ({"teachers": ()}, "at least 1"),
        ({"routes": {"a": ("http://h",)}}, "either the URLs of one teacher"),
        ({"teachers": (), "routes": {"a": ("http://h",)}, "models": {"b": "m"}}, "for .'b'., which has no URL"),
        ({"teachers": (), "routes": {"a": ("http://h",)}, "vocab_sizes": {"b": 9}}, "for .'b'., which has no URL"),
        ({"teachers": (), "routes": {"a": ("http://h",)}, "teacher_id": "a"}, "scores the rows of all of them"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(config, changes, words):
    with pytest.raises(ValueError, match=words):
        config(**changes)


async def test_a_model_in_this_process_scores_in_place_of_a_server(server, config, tmp_path, monkeypatch):
    loaded = []

    class Loaded:
        """What vLLM would be, answered by the server."""

        def __init__(self, model, **engine):
            loaded.append((model, engine))

        async def __aenter__(self):
            self.client = await connect(server.url)
            return self

        async def __aexit__(self, *_):
            await self.client.aclose()

        async def score(self, ids, start, k):
            return await self.client.score(ids, start, k)

    monkeypatch.setattr("topkd.compose.teachers.served.VllmInProcess", Loaded)
    data = written(tmp_path / "data.jsonl", ROWS[:10])
    report = await score(config(data=data, teachers=("vllm:models/teacher",), k=7, vocab_size=4096, engine={"seed": 3}))
    assert (report.scored, report.teacher) == (10, "teacher")
    assert loaded == [("models/teacher", {"max_logprobs": 7, "seed": 3, "vocab_size": 4096})]
    # The same teacher behind a URL: one name, one set of keys.
    assert (await score(config(data=data, k=7))).cached == 10
    for wrong in (("vllm:",), ("vllm:a", "vllm:b")):
        with pytest.raises(ConfigError, match="vllm:"):
            await score(config(data=data, teachers=wrong))
