"""What a run finds out before it opens a model: dead servers, other tokenizers, lengths that do not fit, wrong ends."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from tests.engine.pieces import model_folder
from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.prompts import load_prompts
from topkd.compose.dry_run import dry_run
from topkd.compose.preflight.lengths import check_lengths, compare_ends
from topkd.compose.preflight.preflight import Preflight, preflight
from topkd.compose.preflight.teachers import TeacherInfo, check_same_ids, check_teachers
from topkd.compose.progress import Progress
from topkd.compose.replay import replay
from topkd.compose.train import train
from topkd.engine.loop.metrics import read_metrics
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.rollouts import draw_rollouts
from topkd.engine.loop.scoring import score_rollouts
from topkd.engine.models.tokenizer import load_tokenizer
from topkd.offline import ScoreStore
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk import Rollout, SamplingParams, TopK
from topkd.topk.errors import ConfigError, DataError, KLimitError, ServerUnreachableError, TopkdError

ASK = [{"role": "user", "content": "1 + 1?"}]


class Notes(Progress):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("preflight")
    model_folder(root / "student", seed=1)
    other = model_folder(root / "other", seed=1)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]  # the same pieces, two of them under each other's ids
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (root / "data.jsonl").write_text(json.dumps({"messages": ASK}) + "\n")
    return root


@pytest.fixture(scope="module")
def server(folder):
    config = ServeConfig(model=str(folder / "student"), served_model_name="t", port=0, max_model_len=64, device="cpu")
    with ServerProcess(config) as running:
        yield running


def run_config(folder, url, **changes):
    values = {
        "student": {"model": str(folder / "student"), "device": "cpu"},
        "teacher": {"url": url},
        "data": {"path": str(folder / "data.jsonl")},
        "rollout": {"max_completion_tokens": 8, "prompts_per_step": 2, "samples_per_prompt": 1},
        "client": {"max_retries": 50, "total_timeout_s": 600.0},
        **changes,
    }
    return RunConfig.model_validate(values)


async def test_a_dead_server_is_told_before_a_model_is_opened_whatever_the_runs_patience(folder, tmp_path):
    (tmp_path / "student").mkdir()  # there, and no model
    config = run_config(folder, "http://127.0.0.1:1", student={"model": str(tmp_path / "student")})
    with pytest.raises(ServerUnreachableError, match=r"127.0.0.1:1.*gave up after 4 tries"):
        await train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"student": {"model": "./nope"}}, r"no such model folder \(./nope\)"),
        ({"data": {"path": "nope.jsonl"}}, r"cannot read the data file \(nope.jsonl\): got no such file or folder"),
        ({"data": {"path": "{tmp}/empty.jsonl"}}, r"no usable prompt \(.*empty.jsonl\): got no rows"),
        ({"data": {"path": "{tmp}/broken.jsonl"}}, r"not a JSON object \(.*broken.jsonl:1.*\)"),
        ({"data": {"path": "{tmp}/broken.parquet"}}, r"cannot read the Parquet file \(.*broken.parquet\)"),
        ({"data": {"path": "{tmp}"}}, "neither a saved dataset nor a cache"),
        ({"eval": {"path": "nope.jsonl"}}, r"cannot read the data file \(nope.jsonl\)"),
        ({"eval": {"path": "{data}", "teacher": "./nope"}}, r"no such model folder \(./nope\)"),
    ],
)
async def test_a_mistyped_path_is_told_before_the_teacher_is_asked(folder, tmp_path, wrong, words):
    pytest.importorskip("datasets")
    (tmp_path / "empty.jsonl").touch()
    for name in ("broken.jsonl", "broken.parquet"):
        (tmp_path / name).write_text("{")
    names = {"tmp": str(tmp_path), "data": str(folder / "data.jsonl")}
    filled = {key: {name: value.format(**names) for name, value in table.items()} for key, table in wrong.items()}
    notes = Notes()
    with pytest.raises((ConfigError, DataError), match=words) as told:
        await train(run_config(folder, "http://127.0.0.1:1", **filled), tmp_path / "run", notes)
    assert "\n" not in str(told.value)
    assert told.value.exit_code == 2
    assert notes.said == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"student": {"model": "./nope"}},
        {"student": {"model": "{student}", "chat_template": "nope"}},
        {"teacher": {"kind": "local", "model": "./nope"}},
        {"teacher": {"kind": "local", "model": "{student}", "chat_template": "./nope"}},
        {"data": {"path": "nope"}},
        {"eval": {"path": "./nope", "teacher": "{student}"}},
        {"eval": {"path": "{data}", "teacher": "./nope"}},
    ],
)
async def test_a_missing_file_is_named_with_the_folder_it_was_taken_from(folder, tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    names = {"student": str(folder / "student"), "data": str(folder / "data.jsonl")}
    filled = {table: {key: value.format(**names) for key, value in keys.items()} for table, keys in wrong.items()}
    config = run_config(folder, "", **{"teacher": {"kind": "local", "model": names["student"]}, **filled})
    with pytest.raises((ConfigError, DataError), match=rf"nope.*; a relative path is taken from {tmp_path}"):
        await train(config, tmp_path / "run")


async def test_a_missing_cache_is_named_with_the_folder_it_was_taken_from(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = run_config(folder, "http://127.0.0.1:1", cache={"path": "nope"})
    with pytest.raises(TopkdError, match=rf"nope.*; a relative path is taken from {tmp_path}"):
        await replay(config, tmp_path / "run")
    with pytest.raises(TopkdError, match=rf"other.*; a relative path is taken from {tmp_path}"):
        await replay(config, tmp_path / "run", cache="other")


async def test_a_teacher_that_scores_no_chosen_ids_is_refused_before_a_model_is_loaded(
    folder, server, tmp_path, monkeypatch
):
    monkeypatch.setattr("topkd.engine.models.student.Student.load", None)
    support = {"objective": {"kind": "topk_pg", "support": "union"}}
    config = run_config(folder, server.url, teacher={"url": server.url, "dialect": "vllm"}, **support)
    with pytest.raises(ConfigError, match=r"support = 'union'.*got dialect vllm.*sglang or vllm_generate") as refused:
        await train(config, tmp_path / "run")
    assert (await dry_run(config)).problems == [str(refused.value)]
    own = run_config(folder, server.url, teacher={"kind": "self"}, **support)
    (problem,) = (await dry_run(own)).problems
    assert "support = 'union' needs a teacher that scores chosen ids: got kind \"self\"" in problem
    for teacher in (
        {"url": server.url, "dialect": "vllm_generate"},
        {"kind": "local", "model": str(folder / "student")},
    ):
        assert (await dry_run(run_config(folder, server.url, teacher=teacher, **support))).problems == []
    with ScoreStore(tmp_path / "cache", mode="a"):
        pass
    replayed = (await dry_run(config, served=False, cache=tmp_path / "cache")).problems
    assert [problem for problem in replayed if "support = 'union'" in problem and "got a cache" in problem]


async def test_a_server_is_met_once_and_not_asked_again_by_a_resume(folder, server, tmp_path):
    config, kept = run_config(folder, server.url), tmp_path / "teachers.json"
    met = (await check_teachers(config, Progress(), kept))[""]
    assert (met.model, met.context, met.k, met.tokenizer) == ("t", 64, 20, "same")
    (entry,) = json.loads(kept.read_text())
    assert entry == asdict(met) | {"student": entry["student"]}
    found = json.dumps([entry | {"tokenizer": "yes, as it was found"}])
    kept.write_text(found)
    again = (await check_teachers(config, Progress(), kept, resumed=True))[""]
    assert again.tokenizer == "yes, as it was found"  # the questions were not asked
    wider = run_config(folder, server.url, k=5)
    assert (await check_teachers(wider, Progress(), kept, resumed=True))[""].tokenizer == "same"  # another question
    kept.write_text(found)
    assert (await check_teachers(config, Progress(), kept))[""].tokenizer == "same"  # a new run asks anew


async def test_what_was_not_compared_is_compared_by_the_next_start_and_the_words_name_the_student(
    folder, server, tmp_path
):
    notes, kept = Notes(), tmp_path / "teachers.json"
    missing = run_config(folder, server.url, student={"model": "./nope"})
    await check_teachers(missing, notes, kept)
    assert notes.said[-1].endswith("not compared with the student's: student.model './nope': no tokenizer found")
    for resumed in (False, True):
        await check_teachers(missing, Progress(), kept)
        met = await check_teachers(run_config(folder, server.url), Progress(), kept, resumed=resumed)
        assert met[""].tokenizer == "same"


async def test_a_comparison_with_one_tokenizer_is_none_with_another(folder, server, tmp_path):
    kept = tmp_path / "teachers.json"
    await check_teachers(run_config(folder, server.url), Progress(), kept)
    other = run_config(folder, server.url, student={"model": str(folder / "other")})
    with pytest.raises(ConfigError, match="cannot teach this student"):
        await check_teachers(other, Progress(), kept, resumed=True)


async def test_a_corrected_command_compares_what_the_failed_start_could_not(folder, server, tmp_path):
    missing = run_config(folder, server.url, steps=1, student={"model": str(tmp_path / "nope")})
    with pytest.raises(ConfigError, match="nope"):
        await train(missing, tmp_path / "run")
    other = run_config(folder, server.url, steps=1, student={"model": str(folder / "other"), "device": "cpu"})
    with pytest.raises(ConfigError, match="cannot teach this student"):
        await train(other, tmp_path / "run")
    notes = Notes()
    await train(run_config(folder, server.url, steps=1), tmp_path / "run", notes)
    assert not [said for said in notes.said if "not compared" in said]
    assert json.loads((tmp_path / "run" / "teachers.json").read_text())[0]["tokenizer"] == "same"


async def test_k_above_the_servers_limit_names_both_before_the_run_begins(folder, server, tmp_path):
    with pytest.raises(KLimitError, match=r"K = 21 .*K <= 20"):
        await train(run_config(folder, server.url, k=21), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


async def test_a_teacher_with_other_tokens_is_refused_with_the_first_id_that_differs(folder, server, tmp_path):
    tokenizer = load_tokenizer(str(folder / "student"))
    low, high = sorted(tokenizer.convert_tokens_to_ids(["a", "e"]))
    config = run_config(folder, server.url, student={"model": str(folder / "other"), "device": "cpu"})
    with pytest.raises(
        ConfigError, match=r"cannot teach this student .*id (\d+) is '[ae]' there and '[ae]' here"
    ) as caught:
        await train(config, tmp_path / "run")
    assert f"id {low} is" in str(caught.value) or f"id {high} is" in str(caught.value)
    with pytest.raises(ConfigError, match=rf"2 ids differ, the first is {low}: teacher 'a', student 'e'"):
        check_same_ids(str(folder / "student"), str(folder / "other"))
    check_same_ids(str(folder / "student"), str(folder / "student"))


async def test_a_completion_that_does_not_fit_the_teachers_context_is_refused_at_the_start(folder, server):
    config = run_config(folder, server.url, rollout={"max_completion_tokens": 50})
    with pytest.raises(ConfigError, match=r"do not fit the teacher's context .*line 1.*\+ 50 \+ 1 tokens.*at most 64"):
        await preflight(Preflight(config))


def test_the_one_token_that_scoring_generates_and_the_students_positions_count(folder, tmp_path):
    prompts = load_prompts(run_config(folder, "http://x"), Progress())
    size = prompts.rows[0].prompt_ids.size
    met = {"": TeacherInfo("http://x", "t", "vllm", "", size + 8 + 1, 20, "same")}
    check_lengths(run_config(folder, "http://x"), prompts, met)
    with pytest.raises(ConfigError, match="teacher's context"):
        check_lengths(
            run_config(folder, "http://x"), prompts, {"": TeacherInfo("http://x", "t", "vllm", "", size + 8, 20, "")}
        )
    with pytest.raises(ConfigError, match=r"student's context.*at most 4096"):
        check_lengths(run_config(folder, "http://x", rollout={"max_completion_tokens": 4096}), prompts, {})
    lines = [{"prompt_ids": [5], "completion_ids": [6] * 4096}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = run_config(folder, "http://x", data={"path": str(tmp_path / "long.jsonl")})
    with pytest.raises(ConfigError, match=r"student's context .*got 1 \+ 4096 tokens"):
        check_lengths(config, load_prompts(config, Progress()), {})


def test_a_base_student_of_an_instruct_teacher_is_told_which_end_it_lacks(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder / "student"))
    end, base_end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")
    base = tmp_path / "base"
    model_folder(base, seed=1)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    teacher = {"url": "http://x", "tokenizer": str(folder / "student")}
    config = run_config(folder, "http://x", student={"model": str(base)}, teacher=teacher)
    ends = compare_ends(config, load_prompts(config, Progress()))
    assert ends.stops == (base_end,)
    assert (ends.template, ends.teachers) == (end, {"": end})
    assert len(ends.notes) == 2
    assert all(f"rollout.stop_token_ids = [{end}]" in note for note in ends.notes)
    mended = config.model_copy(update={"rollout": config.rollout.model_copy(update={"stop_token_ids": (end,)})})
    assert compare_ends(mended, load_prompts(mended, Progress())).notes == ()
    same = run_config(folder, "http://x", teacher={"url": "http://x", "tokenizer": str(folder / "student")})
    assert compare_ends(same, load_prompts(same, Progress())).notes == ()


async def test_a_stop_id_of_the_config_ends_a_completion_and_stays_in_it(folder):
    from topkd.engine.models.sampler import InProcessSampler
    from topkd.engine.models.student import Student

    stops = tuple(range(150))
    config = run_config(
        folder, "http://x",
        rollout={"max_completion_tokens": 16, "prompts_per_step": 8, "samples_per_prompt": 2, "stop_token_ids": stops},
    )  # fmt: skip
    sampler = InProcessSampler(Student.load(str(folder / "student"), "cpu"))
    _, rollouts = await draw_rollouts(config, [PromptRow(np.array([200, 201]), np.array([200, 201]))], sampler, 0)
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert len(stopped) > 8
    for rollout in stopped:
        assert rollout.completion_ids[-1] < 150
        assert (rollout.completion_ids[:-1] >= 150).all()


class Scorer:
    async def score(self, ids, start, k):
        actual = np.asarray(ids)[start + 1 :]
        rows = len(actual)
        actual_logp = np.where(actual == 1, -0.5, -1.0)
        return TopK.from_lists([[(1, -0.5)]] * rows, start=start, actual_ids=actual, actual_logp=actual_logp)


async def test_a_truncated_completion_trains_or_is_masked_and_is_counted_either_way():
    row, params = PromptRow(np.array([1, 2]), np.array([1, 2])), SamplingParams(max_tokens=3)
    cut, whole = (
        Rollout(np.array([1, 2]), np.array([4, 5, 6]), np.float32([-1, -1, -1]), reason, params)
        for reason in ("length", "stop")
    )
    kept = await score_rollouts([row, row], [cut, whole], {"": Scorer()}, 1)
    masked = await score_rollouts([row, row], [cut, whole], {"": Scorer()}, 1, truncated="mask")
    assert [sample.core.mask.all() for sample in kept.samples] == [True, True]
    assert [sample.core.mask.any() for sample in masked.samples] == [False, True]
    assert kept.truncated == masked.truncated == 1


async def test_dropped_prompts_and_warnings_stand_in_the_run_log(folder, server, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt_ids": [5, 6], "id": "short"}) + "\n")
    with data.open("a") as file:
        file.write(json.dumps({"prompt_ids": [5] * 99, "id": "long"}) + "\n")
    rollout = {"max_completion_tokens": 4, "prompts_per_step": 2, "max_prompt_tokens": 20, "overlong": "drop"}
    notes = Notes()
    config = run_config(folder, server.url, steps=1, data={"path": str(data)}, rollout=rollout)
    await train(config, tmp_path / "run", notes)
    start = read_metrics(tmp_path / "run" / "metrics.jsonl", "event")[0]
    assert start["data"] == {"rows": 1, "dropped_overlong": 1, "dropped": ["long"]}
    assert any("1 prompts longer than 20 tokens were dropped" in said for said in notes.said)
