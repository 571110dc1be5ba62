"""A key that is not there: named by its own table first, with the full name of what may have been meant."""

import re

import pytest

from topkd.compose.comparison.config import CompareConfig
from topkd.compose.config.run_config import load_config, validate_config
from topkd.topk.errors import ConfigError

GOOD = """
[student]
model = "student"
[teacher]
url = "http://127.0.0.1:8011"
[data]
path = "prompts.jsonl"
"""


def refused(tmp_path, text, *overrides):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", ["learner.lr"]),
        ("batch_size", ["rollout.batch_size"]),
        ("max_completion_tokens", ["rollout.max_completion_tokens"]),
        ("learner.learning_rate", ["learner.lr"]),
        ("rollout.lr", ["learner.lr"]),
        ("rollout.max_new_tokens", ["rollout.max_completion_tokens"]),
        ("rollout.max_completion_token", ["rollout.max_completion_tokens"]),
        ("teacher.ulr", ["teacher.url"]),
        ("teachers.maths.ulr", ["teachers.maths.url"]),
        ("learner.importance.capp", ["learner.importance.cap"]),
        ("objective.lamda", ["objective.lam"]),
        ("student.lora.rank", ["student.lora.r"]),
        ("model", ["student.model", "teacher.model"]),
        ("checkpoint_every", ["checkpoint.every"]),
        ("stepz", ["steps"]),
        ("batch_sise", ["rollout.batch_size"]),
        ("nothing_like_it", []),
    ],
)
def test_a_key_that_is_not_there_is_met_with_the_full_name_of_what_is(tmp_path, key, meant):
    line = refused(tmp_path, GOOD, f"{key}=1")
    assert re.findall(r"'([^']+)'", line.partition("; did you mean ")[2]) == meant


def test_a_table_stands_for_a_table(tmp_path):
    assert refused(tmp_path, GOOD + "[lora]\nr = 4\n").endswith("did you mean 'student.lora'?")
    assert "did you mean" not in refused(tmp_path, GOOD + "[stepz]\na = 4\n")


def test_the_arms_of_a_comparison_have_keys_of_their_own():
    values = {"seeds": [0], "arms": [{"name": "a"}, {"name": "b", "sett": {}}]}
    with pytest.raises(ConfigError, match=r"'arms.1.sett' \(here\); did you mean 'arms.1.set'\?"):
        validate_config(CompareConfig, values, where="here")


def test_a_misspelt_table_is_named_before_the_one_that_is_missing_for_it(tmp_path):
    line = refused(tmp_path, GOOD.replace("[student]", "[studnet]"))
    assert line.startswith("unknown config key 'studnet' (and 1 more: 'student' is missing) (")
    assert line.endswith("; did you mean 'student'?")


def test_what_else_is_wrong_is_named_while_it_is_little(tmp_path):
    two = GOOD.replace("[student]", "[studnet]").replace("[data]", "[dta]")
    assert "(and 3 more: 'dta' is unknown, 'student' is missing, 'data' is missing)" in refused(tmp_path, two)
    assert "'studnet' (and 4 more) (" in refused(tmp_path, two, "k=many")
    assert "'steps' (and 1 more: 'k') (" in refused(tmp_path, GOOD, "steps=many", "k=many")


def test_a_value_that_could_have_had_several_types_is_one_problem(tmp_path):
    assert refused(tmp_path, GOOD, "teacher.url=1").startswith("config key 'teacher.url' (--set teacher.url=1): got 1,")


def test_tables_under_names_of_the_users_own_are_suggested_from_and_never_a_key_of_another_kind(tmp_path):
    two = GOOD.replace("[teacher]", "[teachers.maths]")
    assert "did you mean 'student.model' or 'teacher.model' or 'teachers.maths.model'?" in refused(
        tmp_path, two, "model=1"
    )
    assert "did you mean" not in refused(tmp_path, GOOD, "objective.kind=rkl", "objective.gamm=1")
    assert refused(tmp_path, GOOD, "teachers=5", "stepz=1").endswith("did you mean 'steps'?")
