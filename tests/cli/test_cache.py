"""``topkd cache``, ``score`` and ``replay`` as a user meets them: what they print, the exit codes scripts rely on."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from topkd.cli.app import app
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.topk import Rollout, SamplingParams, TopK
from topkd.topk.errors import CacheError, CacheMissError, ConfigError, DataError

TEACHER = TeacherIdentity("teacher", revision="v1")
AT_H = ["--teacher-id", "a=http://h"]


def ran(*args, code=0):
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout


def told(*args, code=0):
    return json.loads(ran(*args, "--json", code=code))


def fill(path, numbers, rows=6):
    with ScoreStore(path, mode="a") as store:
        for number in numbers:
            ids = np.array([number, *range(10, 10 + rows)], np.int32)
            lists = [[(3, -0.5), (4, -1.5), (7, -2.5)]] * rows
            store.put(TEACHER, ids, TopK.from_lists(lists, actual_ids=ids[1:], actual_logp=[-1.0] * rows))
    return path


@pytest.fixture
def cache(tmp_path):
    path = fill(tmp_path / "cache", range(40))
    with ScoreStore(path, mode="a") as store:
        params = SamplingParams(max_tokens=2, seed=1)
        rollout = Rollout(np.array([1, 2]), np.array([8, 9]), np.float32([-1.0, -2.0]), "stop", params)
        store.put_rollouts(TeacherIdentity("student", revision="run-1"), [1, 2], [rollout], params)
    return path


def test_stats_count_what_is_there(cache):
    found = told("cache", "stats", cache)
    assert found["records"] == 41
    assert (found["scores"], found["rollouts"], found["tokens"]) == (40, 1, 40 * 6 + 2)
    assert found["bytes_per_token"] == pytest.approx(found["bytes"] / found["tokens"])
    assert {(one["name"], one["revision"]) for one in found["teachers"]} == {("teacher", "v1"), ("student", "run-1")}
    expected = sum(np.exp([-0.5, -1.5, -2.5]))
    assert found["profile"]["mass"][3] == pytest.approx(expected, rel=2e-3)
    text = ran("cache", "stats", cache)
    assert "40 scores, 1 rollout, 242 tokens" in text
    assert "run-1" in text


def test_stats_and_verify_say_the_same_of_records_and_bytes_and_a_name_has_the_room_there_is(tmp_path):
    path, params = tmp_path / "cache", SamplingParams(max_tokens=2, seed=1)
    name = "runs/demo-topk_pg-seed0/first-run/teacher"
    with ScoreStore(path, mode="a") as store:
        for first in range(3):
            drawn = [Rollout(np.array([first, 2]), np.array([8, 9 + i]), np.float32([-1.0, -2.0]), "stop", params)
                     for i in range(4)]  # fmt: skip
            store.put_rollouts(TeacherIdentity(name, revision="v1"), [first, 2], drawn, params)
    fill(path, [7], rows=8)
    text = ran("cache", "stats", path)
    assert "1 score, 12 rollouts in 3 records, 32 tokens" in text
    assert max(map(len, text.splitlines())) <= 80
    assert name in text
    assert "all 8" in text, "every score has 8 positions: none of them has fewer"
    size = sum(file.stat().st_size for pattern in ("*.tkl", "*.idx") for file in path.glob(pattern))
    assert f"{size:,} bytes" in text
    checked = ran("cache", "verify", path)
    assert "4 records in" in checked
    assert f"{size:,} bytes, 0 superseded or duplicate: intact" in checked


def test_the_pictures_show_shares_of_k_lengths_mass_and_entropy_in_80_columns(tmp_path):
    fill(fill(tmp_path / "cache", range(30)), range(100, 110), rows=90)
    lines = ran("cache", "stats", tmp_path / "cache").splitlines()
    assert max(map(len, lines)) <= 80
    (k,) = [line for line in lines if line.lstrip().startswith("3 █")]
    assert "100 %" in k
    lengths = [
        line[42:].split()
        for line in lines
        if line[42:].lstrip()[:1].isdigit() and "%" in line[42:] and "to" not in line[:38]
    ]
    assert ["4", "to", "7", *lengths[0][3:]] == lengths[0]
    assert lengths[0][-2:] == ["75", "%"]
    assert any(line[42:].split()[-2:] == ["25", "%"] and "64 and up" in line[42:] for line in lines)
    # exp(-.5) + exp(-1.5) + exp(-2.5) = 0.912: between 5 and 10 % lie outside every list.
    (mass,) = [line[:38] for line in lines if line.startswith("    5 to 10")]
    assert mass.split()[-2:] == ["100", "%"]
    assert "█" * 15 in mass
    # and the list's lower bound on the entropy, with them as one lump, is 1.06 nats
    (entropy,) = [line[42:] for line in lines if line[42:].lstrip().startswith("1 to 2")]
    assert entropy.split()[-2:] == ["100", "%"]


def test_a_bar_is_never_nothing_for_something_and_plain_where_blocks_cannot_be_shown(monkeypatch):
    from topkd.cli.output import cache_stats as pictures

    assert pictures.draw_bar(0.0, 10).strip() == ""
    assert pictures.draw_bar(1e-9, 10).strip() == "▏"
    assert pictures.draw_bar(0.55, 10) == "█████▌    "
    assert [pictures.format_share(share) for share in (0, 1e-5, 0.034, 0.5, 0.9999, 1)] == [
        "0 %", "<0.1 %", "3.4 %", "50 %", ">99.9%", "100 %"
    ]  # fmt: skip
    assert pictures.label_counts([4, 5, 8]) == ["4", "5 to 7", "8 and up"]
    monkeypatch.setattr(pictures.sys, "stdout", type("Terminal", (), {"encoding": "ascii"})())
    assert pictures.draw_bar(0.55, 10) == "#####     "


def test_verify_is_content_with_a_whole_cache_and_names_damage_with_exit_code_1(cache):
    whole, counted = told("cache", "verify", cache), told("cache", "stats", cache)
    assert whole["ok"] is True
    assert all(whole[name] == counted[name] for name in ("records", "tokens", "bytes_per_token"))
    assert "intact" in ran("cache", "verify", cache)
    segment = max(cache.glob("seg-*.tkl"), key=lambda file: file.stat().st_size)
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0xFF
    segment.write_bytes(data)
    found = told("cache", "verify", cache, code=1)
    assert not found["ok"]
    assert (found["records"], found["tokens"]) == (40, counted["tokens"] - 6)
    assert found["damage"][0]["segment"] == segment.name
    text = ran("cache", "verify", cache, code=1)
    assert segment.name in text
    assert "DAMAGED" in text


def test_ls_shows_each_record_and_says_when_there_are_more(cache):
    lines = [json.loads(line) for line in ran("cache", "ls", cache, "--json", "--limit", "100").splitlines()]
    assert len(lines) == 41
    scores = [line for line in lines if line["kind"] == "score"]  # two writers: which segment comes first is chance
    assert {line["teacher"] for line in scores} == {"teacher"}
    assert [line["first_ids"] for line in scores] == [[number, 10, 11, 12, 13, 14] for number in range(40)]
    assert [line["teacher"] for line in lines if line["kind"] == "rollout"] == ["student"]
    text = ran("cache", "ls", cache, "--limit", "3")
    assert len(text.splitlines()) == 4
    assert "--limit" in text


def test_merge_brings_what_is_lacking_and_gc_drops_what_is_superseded(cache, tmp_path):
    other = fill(tmp_path / "other", range(30, 50))
    assert told("cache", "merge", cache, other, "--out", tmp_path / "all")["copied"] == 51
    assert told("cache", "stats", tmp_path / "all")["scores"] == 50
    wide = tmp_path / "wide"
    shutil.copytree(cache, wide)
    with ScoreStore(wide, mode="a") as store:
        ids = np.array([0, *range(10, 16)], np.int32)
        lists = [[(3, -0.5), (4, -1.5), (7, -2.5), (9, -3.5)]] * 6
        store.put(TEACHER, ids, TopK.from_lists(lists, actual_ids=ids[1:], actual_logp=[-1.0] * 6))
    assert told("cache", "gc", wide, "--codec", "cold")["dropped"] == 1
    found = told("cache", "stats", wide)
    assert found["records"] == found["live"] == 41
    assert found["codecs"]["cold"] >= 40


def test_what_is_exported_can_be_imported(cache, tmp_path):
    pytest.importorskip("pyarrow")
    assert told("cache", "export", cache, tmp_path / "files")["records"] == 41
    assert told("cache", "import", tmp_path / "back", tmp_path / "files")["records"] == 41
    ids = [7, *range(10, 16)]
    with ScoreStore(cache) as was, ScoreStore(tmp_path / "back") as now:
        left, right = was.get(TEACHER, ids, 0, 3), now.get(TEACHER, ids, 0, 3)
    assert np.array_equal(left.logp, right.logp)
    assert np.array_equal(left.actual_logp, right.actual_logp)


def test_captures_of_other_tools_need_a_teachers_name_and_bring_their_rows(cache, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "logprobs": [[-0.1, -3.0], [-0.2, -2.0]], "target_token_ids": [[6, 1], [7, 2]]}]
    source = tmp_path / "axolotl.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="needs --teacher"):
        ran("cache", "import", cache, source, "--format", "axolotl")
    done = told("cache", "import", cache, source, "--format", "axolotl", "--teacher", "t")
    assert (done["records"], done["refused"]) == (1, [])
    source.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"text": "no ids"}) + "\n")
    done = told("cache", "import", cache, source, "--format", "axolotl", "--teacher", "t", code=1)
    assert done["records"] == 1
    assert done["refused"][0].startswith(f"{source}, row 1: the row has no input_ids")
    source.write_text("\n")
    with pytest.raises(DataError, match="nothing to import"):
        ran("cache", "import", tmp_path / "new", source, "--format", "axolotl", "--teacher", "t")
    assert not (tmp_path / "new").exists()


def test_an_export_goes_into_no_cache(cache):
    held = sorted(path.name for path in cache.iterdir())
    with pytest.raises(ConfigError, match="the folder to export to is a cache"):
        ran("cache", "export", cache, cache)
    assert sorted(path.name for path in cache.iterdir()) == held


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("form", ["parquet", "dataset", "axolotl", "distillkit"])
def test_an_import_that_cannot_be_read_leaves_no_empty_cache(cache, tmp_path, form, there):
    pytest.importorskip("datasets")
    source, target = tmp_path / "junk", tmp_path / "target"
    source.write_text("junk\n")
    if there:
        target.mkdir()
    with pytest.raises((DataError, ConfigError)):
        ran("cache", "import", target, source, "--format", form, "--teacher", "t")
    assert target.exists() == there
    assert not there or not list(target.iterdir())
    held = {path: path.read_bytes() for path in cache.iterdir()}
    with pytest.raises((DataError, ConfigError)):
        ran("cache", "import", cache, source, "--format", form, "--teacher", "t")
    assert {path: path.read_bytes() for path in cache.iterdir()} == held, "what was there stays"


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (["cache", "stats", "nowhere"], CacheError, "no such file or folder (nowhere)"),
        (["cache", "verify", "./nowhere"], CacheError, "no such file or folder (nowhere)"),
        (["cache", "ls", "folder"], CacheError, "not a topkd cache (folder): got a folder without topkd-store.json"),
        (["cache", "stats", "run.toml"], CacheError, "not a topkd cache (run.toml): got a file, expected a folder"),
        (["cache", "ls", "nowhere"], CacheError, "no such file or folder (nowhere)"),
        (["cache", "ls", "run.toml"], CacheError, "not a topkd cache (run.toml): got a file, expected a folder"),
        (["cache", "merge", "nowhere", "--out", "c"], CacheError, "no such file or folder (nowhere)"),
        (["cache", "merge", "empty", "empty", "--out", "./empty"], ConfigError, "merged into itself"),
        (["cache", "merge", "empty", "--out", "run.toml"], CacheError, "(run.toml): got a file, expected a folder"),
        (["cache", "merge", "empty", "--out", "run.toml/c"], CacheError, "cannot create the cache (run.toml/c)"),
        (["cache", "merge", "empty", "--out", "folder/."], CacheError, "needs an empty folder"),
        (["cache", "export", "empty", "run.toml"], CacheError, "cannot export there (run.toml): got File exists"),
        (["cache", "export", "empty", "run.toml/x", "--format", "dataset"], CacheError, "cannot export there"),
        (["cache", "import", "empty", "run.toml"], DataError, "cannot read the Parquet file (run.toml)"),
        (["cache", "import", "c", "nowhere"], DataError, "no such file or folder (nowhere)"),
        (["sample", "none.jsonl", "--teacher", "u", "--out", "c"], DataError, "no such file or folder (none.jsonl)"),
        (
            ["sample", "d", "--teacher", "u", "--out", "c", "--max-cost", "1"],
            ConfigError,
            "needs price_in and price_out",
        ),
        (
            ["score", "d", "--out", "c"],
            ConfigError,
            "score needs one way to name its teachers: got none, expected --teacher URL",
        ),
        (
            ["score", "d", "--out", "c", "--teacher", "u", "--teacher-id", "a=http://h"],
            ConfigError,
            "score needs one way to name its teachers: got both",
        ),
        (["score", "d", "--out", "c", "--teacher-id", "a=h"], ConfigError, "--teacher-id takes NAME=URL: got a=h"),
        (["score", "d", "--out", "c", "--teacher-id", "a=http://h", "--teacher-id", "b"], ConfigError, "one NAME, or"),
        (
            ["score", "d", "--out", "c", "--teacher-id", "a=http://h", "--model", "m", "--model", "n"],
            ConfigError,
            "--model was",
        ),
        (["score", "d", "--out", "c", "--teacher", "u", "--runner", "slurm"], ConfigError, "'runner'"),
        (["probe", "http://127.0.0.1:1", "--api-key-env", "NO_SUCH_NAME"], ConfigError, "NO_SUCH_NAME (--api-key-env)"),
        (["score", "none.jsonl", "--teacher", "http://127.0.0.1:1", "--out", "c"], DataError, "none.jsonl"),
        (["score", "d", "--teacher", "u", "--out", "c", "--shard", "3/2"], ConfigError, "--shard takes I/N: got 3/2"),
        (["score", "d", "--teacher", "u", "--out", "c", "--max-cost", "2"], ConfigError, "price_per_million"),
        (["score", "d", "--teacher", "u", "--out", "c", "--api-key-env", "NO_SUCH_NAME"], ConfigError, "NO_SUCH_NAME"),
        (["replay", "none.toml", "--out", "o"], ConfigError, "none.toml"),
        (["replay", "run.toml", "--out", "o"], ConfigError, "--cache DIR"),
        (["replay", "run.toml", "--out", "o", "--cache", "empty"], CacheMissError, "no scores of this teacher"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, args, error, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("[student]\nmodel='m'\n[teacher]\nurl='http://127.0.0.1:1'\n[data]\npath='p'\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "of something else").touch()
    with ScoreStore(tmp_path / "empty", mode="a"):
        pass
    with pytest.raises(error) as caught:
        ran(*args)
    assert words in str(caught.value)
    assert caught.value.exit_code == (1 if error is CacheMissError else 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        ["score"],
        ["sample"],
        ["replay"],
        *(["cache", name] for name in ("stats", "verify", "ls", "gc", "merge", "export", "import")),
    ],
    ids=" ".join,
)
def test_every_command_has_help_with_an_example(command):
    assert "Example: topkd" in ran(*command, "--help")


def test_a_damaged_format_file_says_how_to_mend_it(cache):
    (cache / "topkd-store.json").write_text("{")
    with pytest.raises(CacheError, match=r"format file is damaged .*the records are in the segments") as caught:
        ran("cache", "stats", cache)
    assert caught.value.exit_code == 1
