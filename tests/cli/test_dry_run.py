"""``--dry-run``: what a run would do, on a page of 80 columns or as JSON, and every problem at once."""

import json

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.engine.pieces import model_folder
from topkd.cli.app import app
from topkd.cli.output.dry_run_page import print_dry_run
from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.prompts import load_prompts
from topkd.compose.dry_run import dry_run, list_settings
from topkd.compose.progress import Progress
from topkd.compose.run.runner import load_student
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk import Rollout, SamplingParams, TopK
from topkd.topk.errors import TopkdError

TALK = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and 2 + 2?"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("dry")
    model_folder(root / "student", seed=1)
    lines = [{"messages": TALK, "hint": "add them up"}, {"prompt_ids": [5] * 99}]
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def server(folder):
    config = ServeConfig(
        model=str(folder / "student"), served_model_name="teacher", port=0, max_logprobs=20, device="cpu"
    )
    with ServerProcess(config) as running:
        yield running


def run_config(folder, url, **changes):
    return RunConfig.model_validate(
        {
            "student": {"model": str(folder / "student"), "device": "cpu"},
            "teacher": {"url": url},
            "data": {"path": str(folder / "data.jsonl"), "turns": "all"},
            "rollout": {
                "max_prompt_tokens": 64,
                "overlong": "drop",
                "prompts_per_step": 2,
                "max_completion_tokens": 32,
            },
            "client": {"max_retries": 1, "backoff_s": 0.05},
            **changes,
        }
    )


async def test_a_sound_run_is_told_in_whole_and_changes_nothing(folder, server, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    config = run_config(folder, server.url)
    found = await dry_run(config)
    assert found.problems == []
    (endpoint,) = found.endpoints
    assert (endpoint.can_teach, endpoint.k, endpoint.model) == (True, 20, "teacher")
    assert found.data["rows"] == found.data["dropped_overlong"] == 1
    assert found.data["privileged"] == 1
    assert [rendered.side for rendered in found.prompts] == ["student", "teacher"]
    assert "add them up" in found.prompts[1].parts[0][0]
    assert "add them up" not in found.prompts[0].parts[0][0]
    trains = "".join(text for text, trains in found.prompts[0].parts if trains)
    assert trains == "two<|im_end|>four<|im_end|>"
    from topkd.engine.models.student import Student

    weights = sum(one.numel() for one in Student.load(str(folder / "student"), "cpu").model.parameters())
    assert found.forecast.model.parameters == found.forecast.model.trained == weights
    assert found.forecast.memory["optimiser"] == 8 * weights
    assert found.forecast.teacher_requests_per_step == 2 * 4
    assert json.loads(json.dumps(found.as_json(), default=str))["ok"] is True


async def test_the_page_fits_80_columns_and_shows_mask_colours_only_where_colours_are_wanted(
    folder, server, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    config = run_config(folder, server.url)
    found = await dry_run(config)
    pages = {}
    for colour in (True, False):
        console = Console(width=80, record=True, quiet=False, force_terminal=colour, no_color=not colour, file=None)
        with console.capture() as captured:
            print_dry_run(found, config, console)
        pages[colour] = captured.get()
    assert "\x1b[1;32mtwo<|im_end|>" in pages[True]
    assert "\x1b[33m<|im_start|>user" in pages[True]
    assert "\x1b[3" not in pages[False]
    assert max(len(line) for line in pages[False].splitlines()) <= 80
    screen = pages[False].splitlines()[-24:]  # what a small terminal still shows when the page is through
    assert screen[-1] == "no problem found: this run can start"
    assert any("can teach: K <= 20" in line for line in screen)
    assert any("topk_pg (beta 0.5" in line for line in screen)
    for words in ("can teach: K <= 20", "1 dropped as too long", "micro_batch_tokens 16384", "no problem found"):
        assert words in pages[False]


async def test_every_problem_is_told_not_only_the_first(folder):
    found = await dry_run(run_config(folder, "http://127.0.0.1:1", data={"path": "/no/such/file"}))
    assert len(found.problems) == 2
    assert "/no/such/file" in found.problems[0]
    assert "http://127.0.0.1:1" in found.problems[1]


@pytest.mark.parametrize(
    ("rows", "rollout", "words"),
    [
        ([{"prompt_ids": [5]}, {"prompt_ids": [5, 99_999]}], {}, "other.jsonl, line 2): got 99999"),
        ([{"prompt_ids": [5], "completion_ids": [7, 99_999]}], {}, "other.jsonl, line 1): got 99999"),
        ([{"prompt_ids": [5]}], {"stop_token_ids": [99_999]}, "rollout.stop_token_ids holds an id that the student"),
    ],
)
async def test_an_id_that_the_student_does_not_have_is_a_problem_here_as_in_the_run(
    folder, tmp_path, rows, rollout, words
):
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = {"kind": "local", "model": str(folder / "student")}
    config = run_config(folder, "", teacher=teacher, data={"path": str(tmp_path / "other.jsonl")}, rollout=rollout)
    (problem,) = (await dry_run(config)).problems
    assert words in problem
    prompts = load_prompts(config, Progress())
    assert prompts.rows, "nothing but the id is wrong"
    with pytest.raises(TopkdError) as caught:
        load_student(config, prompts)
    assert str(caught.value) == problem


async def test_a_missing_student_is_one_problem_and_its_teacher_is_looked_at_all_the_same(folder, server, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    found = await dry_run(run_config(folder, server.url, student={"model": "./nope"}))
    assert len(found.problems) == 1
    assert "no such model folder (./nope)" in found.problems[0]
    assert not any("tokenizer" in note for note in found.notes)
    assert found.endpoints[0].can_teach


async def test_in_a_file_what_was_given_is_starred_and_no_path_or_number_is_cut(folder, server, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    data = tmp_path / ("a-folder-with-a-long-name-" * 4) / "prompts.jsonl"
    data.parent.mkdir()
    data.write_text((folder / "data.jsonl").read_text())
    table = {"path": str(data), "turns": "all"}
    config = run_config(folder, server.url, data=table, k=21, steps=3210)
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as captured:
        print_dry_run(await dry_run(config), config, console)
    page = captured.get()
    assert "SETTINGS  (*: set" in page
    assert "*steps 3210" in page
    assert " seed 0" in page
    assert page.replace("\n", "").replace(" ", "").count(str(data)) >= 2
    assert "…" not in page
    assert "e+0" not in page
    assert "K = 21 is above its limit; it can teach: K <= 20" in " ".join(page.split())


async def test_k_above_the_servers_limit_is_a_problem_with_both_numbers(folder, server, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    found = await dry_run(run_config(folder, server.url, k=21))
    (problem,) = found.problems
    assert "K = 21" in problem
    assert "K <= 20" in problem


async def test_problems_end_the_page_each_in_whole(folder):
    config = run_config(folder, "http://127.0.0.1:1", data={"path": "/no/such/file"})
    found = await dry_run(config)
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as captured:
        print_dry_run(found, config, console)
    lines = captured.get().splitlines()
    assert lines[-1] == "2 problems found: this run would fail"
    assert [line for line in lines[-12:] if line.startswith("problem  ")]
    told = " ".join(line.strip() for line in lines).replace("problem  ", "")
    assert all(problem in told for problem in found.problems)


@pytest.fixture
def kept(tmp_path_factory):
    cache, params = tmp_path_factory.mktemp("kept") / "cache", SamplingParams(max_tokens=2, seed=1)
    ids = np.arange(5, 10, dtype=np.int32)
    with ScoreStore(cache, mode="a") as store:
        scores = TopK.from_lists([[(3, -0.5), (4, -1.5)]] * 2, start=2, actual_ids=ids[3:])
        store.put(TeacherIdentity("teacher"), ids, scores, asked=20)
        rollout = Rollout(ids[:3], ids[3:], np.float32([-1.0, -2.0]), "stop", params)
        store.put_rollouts(TeacherIdentity("student", revision="run-1"), ids[:3], [rollout], params)
    return cache


async def test_a_replay_is_told_what_the_cache_has_and_every_way_in_which_it_cannot_answer(folder, kept, tmp_path):
    async def looked(folder_of_cache, **changes):
        config = run_config(folder, "http://127.0.0.1:1", **changes)
        found = await dry_run(config, served=False, cache=folder_of_cache, out=tmp_path / "run")
        return found.problems, found.notes

    problems, notes = await looked(kept)
    assert problems == []
    assert f"{kept} has rollouts of 'student' (replay.policy = 'run-1'), scored by 'teacher'" in notes
    assert (await looked(None, cache={"path": str(kept)}))[0] == []
    named = {"url": "http://127.0.0.1:1", "model": "./teacher"}
    assert (await looked(kept, teacher=named))[0] == []
    with ScoreStore(tmp_path / "empty", mode="a"):
        pass
    cases = [
        (None, {}, "no cache to replay"),
        (tmp_path / "nowhere", {}, "no such file or folder"),
        (tmp_path / "empty", {}, "no scores of this teacher"),
        (kept, {"k": 21}, "no scores with K entries"),
        (kept, {"teacher": {**named, "revision": "v2"}}, "expected 'teacher' (revision 'v2')"),
        (kept, {"replay": {"policy": "run-2"}}, "expected replay.policy = 'run-1'"),
    ]
    for cache, changes, words in cases:
        (problem,), _ = await looked(cache, **changes)
        assert words in problem


async def test_a_shuffled_replay_is_told_whether_the_completions_are_of_its_prompts(folder, kept, tmp_path):
    async def looked(prompt_ids, **replay):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt_ids": prompt_ids}) + "\n")
        more = {"data": {"path": str(tmp_path / "rows.jsonl")}, "replay": {"order": "shuffled", **replay}}
        return await dry_run(run_config(folder, "http://127.0.0.1:1", **more), served=False, cache=kept)

    fits, strange = await looked([5, 6, 7]), await looked([5, 6])
    assert fits.problems == []
    assert "1 recorded completions to draw from" in fits.notes
    (problem,) = strange.problems
    assert problem.startswith(f"no recorded completion has one of these prompts ({kept}, policy 'run-1'): got 1 compl")


async def test_a_folder_that_the_run_could_not_have_is_a_problem_and_one_it_goes_on_in_a_note(folder, tmp_path):
    config = run_config(folder, "", teacher={"kind": "local", "model": str(folder / "student")})
    (tmp_path / "notes.txt").write_text("mine")
    found = await dry_run(config, out=tmp_path)
    (problem,) = found.problems
    assert problem.startswith(f"the output folder holds files that are not a run's ({tmp_path}): got notes.txt")
    resumed = await dry_run(config, out=tmp_path, resume=True)
    assert resumed.problems == [f"there is no run to resume ({tmp_path}); leave out --resume"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes.txt"]
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json.partial").write_text("{")
    assert (await dry_run(config, out=out)).problems == [], "killed while its config was written"
    (out / "config.json").write_text(config.model_dump_json())
    assert (await dry_run(config, out=out)).problems == [], "a run that took no step makes room"
    found = await dry_run(config, out=out, resume=True)
    assert (found.problems, found.notes[0]) == ([], f"the run in {out} would continue from the beginning")
    other = config.model_copy(update={"seed": 9})
    (problem,) = (await dry_run(other, out=out, resume=True)).problems
    assert "seed 0 -> 9" in problem


def test_the_command_exits_2_on_a_problem_and_its_json_says_which(folder, kept, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        f"[student]\nmodel='{folder / 'student'}'\n[teacher]\nurl='http://127.0.0.1:1'\n"
        f"[data]\npath='{folder / 'data.jsonl'}'\n[client]\nmax_retries=0\n[rollout]\noverlong='drop'\n"
    )
    arguments = ["train", str(path), "--out", str(tmp_path / "o"), "--dry-run", "--json", "--set", "objective.kind=gjs"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    said = json.loads(done.stdout)
    assert said["ok"] is False
    assert said["config"]["objective"]["kind"] == "gjs"
    assert ["objective.kind", "gjs", True] in said["settings"]
    assert not (tmp_path / "o").exists()
    replayed = CliRunner().invoke(app, ["replay", *arguments[1:], "--cache", str(kept)])
    assert replayed.exit_code == 0, replayed.output  # a replay asks no server
    lacking = CliRunner().invoke(app, ["replay", *arguments[1:], "--cache", str(kept / "nowhere")])
    assert lacking.exit_code == 2
    assert "no such file or folder" in json.loads(lacking.stdout)["problems"][0]


def test_settings_say_what_was_given_and_what_is_a_default(folder):
    found = {key: (value, given) for key, value, given in list_settings(run_config(folder, "http://x", k=7))}
    assert found["k"] == (7, True)
    assert found["steps"] == (100, False)
    assert found["rollout.overlong"] == ("drop", True)
    assert found["rollout.truncated"] == ("keep", False)
