"""What ``topkd score`` says of tokens, costs, ids and sources that hold nothing."""

import json
import os
import re

import pytest

from tests.cli.test_cache import fill, ran, told
from tests.docs.blocks import ROOT
from tests.engine.pieces import model_folder
from topkd.compose.bulk.config import ScoreConfig
from topkd.compose.bulk.job import SpendingLimit
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import ConfigError, DataError

DEAD = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = model_folder(tmp_path_factory.mktemp("models") / "teacher", seed=2)
    with ServerProcess(ServeConfig(model=str(model), served_model_name="t", port=0, device="cpu")) as running:
        yield running


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt_ids": [3, 4 + i], "completion_ids": [5, 6, 7]} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_was_sent_is_what_is_spared_the_next_time_and_a_cost_names_its_currency(server, data, tmp_path):
    job = ("score", data, "--teacher", server.url, "--out", tmp_path / "cache", "--price-per-million", "1000")
    assert "48 tokens to send, 0 saved by the cache, cost 0.0480 (in the currency of the price)" in ran(
        *job, "--estimate"
    )
    assert "48 tokens sent, 0 saved" in ran(*job)
    assert "0 tokens sent, 48 saved" in ran(*job)
    assert "0 tokens to send, 48 saved" in ran(*job, "--estimate")


def test_an_estimate_foretells_ids_that_a_teacher_of_known_size_cannot_have(data, tmp_path):
    job = ("score", data, "--out", tmp_path / "cache", "--estimate")
    text = ran(*job, "--teacher", DEAD)
    assert "largest id 11; --vocab-size N" in text
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert "largest id" not in ran(
        "score", tmp_path / "bad.jsonl", "--out", tmp_path / "cache", "--estimate", "--teacher", DEAD
    ), "no row has an id"
    text = ran(*job, "--teacher", DEAD, "--vocab-size", "10")
    assert "6 to score, 2 refused" in text
    assert "data.jsonl:7): got 10, expected below 10" in text
    assert "largest id" not in text
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 11}}))
    assert told(*job, "--teacher", f"vllm:{folder}")["refused"] == 1
    assert told(*job, "--teacher", f"vllm:{tmp_path / 'elsewhere'}")["refused"] == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--limit", 10**30, "'limit'.*less than or equal to"),
        ("--in-flight", 10**11, "'in_flight'.*less than or equal to 10000"),
        ("--max-cost", "inf", "'max_cost'.*a finite number"),
        ("--price-per-million", "inf", "'price_per_million'.*a finite number"),
        ("--engine", "dtype=bfloat16", "engine settings are for a teacher that is loaded here"),
        ("--ray-address", "127.0.0.1:6379", "ray_address and gpus_per_worker need runner = ray"),
        ("--gpus-per-worker", 1, "ray_address and gpus_per_worker need runner = ray"),
    ],
)
def test_what_cannot_be_meant_is_a_mistake_and_neither_hangs_nor_is_passed_over(data, tmp_path, option, value, message):
    with pytest.raises(ConfigError, match=message):
        ran("score", data, "--teacher", DEAD, "--out", tmp_path / "cache", option, value)


def test_a_cap_that_no_number_of_tokens_reaches_caps_nothing(data, tmp_path):
    job = ("score", data, "--teacher", DEAD, "--out", tmp_path / "cache", "--estimate", "--price-per-million", "1e-300")
    assert told(*job, "--max-cost", "1e308")["scored"] == 8
    values = {"data": data, "out": tmp_path, "teachers": (DEAD,), "price_per_million": 1e-300, "max_cost": 1e308}
    assert SpendingLimit(ScoreConfig.model_validate(values).caps()).take(10**12)


@pytest.mark.parametrize("more", [(), ("--estimate",)])
def test_a_cache_without_rollouts_is_no_source(tmp_path, more):
    held = fill(tmp_path / "scores", range(3))
    with pytest.raises(DataError, match="holds no rollouts to score") as refused:
        ran("score", held, "--teacher", DEAD, "--out", tmp_path / "cache", *more)
    assert refused.value.exit_code == 2
    assert str(held) in str(refused.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("command", [("score",), ("score", "--estimate"), ("sample",)])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_data_without_a_row_is_a_mistake_and_no_job_that_is_done(tmp_path, command, text):
    data = tmp_path / "cut.jsonl"
    data.write_text(text)
    with pytest.raises(DataError, match="the data holds no row") as refused:
        ran(*command, data, "--teacher", DEAD, "--out", tmp_path / "cache")
    assert refused.value.exit_code == 2
    assert str(data) in str(refused.value)
    assert not (tmp_path / "cache").exists()


def test_the_walk_throughs_ids_are_ids_of_the_demos_teacher():
    from topkd.compose.demo_assets.assets import VOCAB

    page = (ROOT / "docs" / "offline.md").read_text(encoding="utf-8")
    bounds = [int(bound) for bound in re.findall(r"randrange\(3, (\d+)\)", page)]
    assert len(bounds) == 2
    assert max(bounds) <= VOCAB


@pytest.mark.parametrize("command", ["score", "sample"])
def test_a_pipe_is_refused_as_its_rows_can_be_read_but_once(tmp_path, command):
    end, begin = os.pipe()
    os.write(begin, b'{"prompt_ids": [1, 2], "completion_ids": [3]}\n')
    os.close(begin)
    try:
        with pytest.raises(DataError, match=r"neither a file nor a folder .*a pipe is read once"):
            ran(command, f"/dev/fd/{end}", "--teacher", DEAD, "--out", tmp_path / "cache", "--estimate")
    finally:
        os.close(end)
