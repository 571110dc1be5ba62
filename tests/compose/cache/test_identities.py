"""One teacher is paid once, however the folder it is served from was written."""

import json

import numpy as np
import pytest

from tests.fakes.in_process import InProcessTeacher, lists
from topkd.compose import score as job
from topkd.compose.bulk.config import ScoreConfig
from topkd.compose.cache.identity import build_served_identity, normalize_served_name
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.serve import ServeConfig
from topkd.topk.errors import ConfigError


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("./student", "student"),
        ("student/", "student"),
        ("models//teacher/.", "models/teacher"),
        ("runs/a/../b/student", "runs/b/student"),
        ("/models/teacher/", "/models/teacher"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("teacher:v1", "teacher:v1"),
        ("a name", "a name"),
    ],
)
def test_ways_to_write_one_folder_are_one_name(spelling, name):
    assert normalize_served_name(spelling) == name


def test_names_that_may_be_two_models_stay_two():
    names = {"a/student", "b/student", "student", "/student", "../student", "Student", "org/student"}
    assert len({normalize_served_name(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", [".", "./", "..", "../../", "/"])
def test_a_name_that_says_nothing_needs_a_revision(tmp_path, name):
    with ScoreStore(tmp_path, mode="a") as store:
        with pytest.raises(ConfigError, match="does not identify the model"):
            build_served_identity(store, name)
        assert build_served_identity(store, name, "v1").revision == "v1"


@pytest.mark.parametrize("name", ["http://10.0.0.1:8000/m", "https://key@host/m", " "])
def test_an_address_is_no_name_in_any_spelling(tmp_path, name):
    with ScoreStore(tmp_path, mode="a") as store, pytest.raises(ConfigError, match="teacher identity"):
        build_served_identity(store, name, "v1")


@pytest.mark.parametrize("spelling", ["./teacher", "teacher/", "teacher"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_cache_goes_on_under_the_name_it_was_begun_with(tmp_path, spelling, sealed):
    old, ids = TeacherIdentity(spelling, revision="v1"), np.arange(6, dtype=np.int32)
    first = ScoreStore(tmp_path, mode="a")
    first.put(old, ids, lists(ids, 1))
    first.close() if sealed else first.commit()
    with ScoreStore(tmp_path, mode="a") as store:
        for again in ("teacher", "./teacher", "./teacher/"):
            assert build_served_identity(store, again, "v1") == old
        assert build_served_identity(store, "./teacher", "v2") == TeacherIdentity("teacher", revision="v2")
        assert build_served_identity(store, "./other", "v1") == TeacherIdentity("other", revision="v1")
    first.close()


def test_beside_a_name_in_its_own_spelling_another_one_is_not_chosen(tmp_path):
    ids = np.arange(6, dtype=np.int32)
    with ScoreStore(tmp_path, mode="a") as store:
        for name in ("./teacher", "teacher"):
            store.put(TeacherIdentity(name), ids, lists(ids, 1))
    with ScoreStore(tmp_path) as store:
        assert build_served_identity(store, "./teacher") == TeacherIdentity("teacher")


async def test_scores_under_one_spelling_cost_nothing_under_another(tmp_path, monkeypatch):
    monkeypatch.setattr("topkd.compose.teachers.served.VllmInProcess", InProcessTeacher)
    InProcessTeacher.asked.clear()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt_ids": [1, 2], "completion_ids": [3, i]}) + "\n" for i in range(9)))

    async def score(model, **changes):
        config = ScoreConfig(data=data, out=tmp_path / "cache", teachers=("vllm:x",), model=model, k=2, **changes)
        return await job.score(config)

    assert (await score("./teacher/")).scored == 9
    assert (await score("teacher", estimate=True)).tokens_sent == 0
    assert (await score("teacher")).cached == 9
    assert len(InProcessTeacher.asked) == 9
    assert (await score("models/teacher")).scored == 9


@pytest.mark.parametrize(
    ("model", "name"), [("./models/t", "./models/t"), ("org/m", "org/m"), (".", "t"), ("sub/..", "t")]
)
def test_a_served_folder_is_called_as_it_was_written_unless_that_says_nothing(tmp_path, monkeypatch, model, name):
    (tmp_path / "t" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "t")
    assert ServeConfig(model=model).name == name
    assert ServeConfig(model=model, served_model_name="mine").name == "mine"
