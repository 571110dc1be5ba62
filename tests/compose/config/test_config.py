"""Run configs: what is accepted, and one clear line for what is not."""

import json

import pytest

from topkd.compose.config.api_keys import read_api_key
from topkd.compose.config.run_config import RunConfig, load_config, validate_config
from topkd.topk.errors import ConfigError

GOOD = """
steps = 7
[student]
model = "student"
[teacher]
url = "http://127.0.0.1:8011"
[data]
path = "prompts.jsonl"
[objective]
kind = "gjs"
beta = 0.3
"""


def written(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_a_config_is_read_with_defaults_and_overrides(tmp_path):
    config = load_config(written(tmp_path, GOOD), ["steps=9", "objective.kind=topk_pg", "learner.lr=1e-5", "k=8"])
    assert (config.steps, config.k, config.learner.lr, config.objective.kind) == (9, 8, 1e-5, "topk_pg")
    assert (config.objective.beta, config.objective.lam) == (0.3, 0.3)
    assert load_config(written(tmp_path, GOOD)).objective.beta == 0.3


def test_objective_settings_without_a_kind_are_those_of_the_default(tmp_path):
    bare = written(tmp_path, GOOD.split("[objective]", maxsplit=1)[0])
    objective = load_config(bare, ["objective.lam=0.9"]).objective
    assert (objective.kind, objective.beta, objective.lam) == ("topk_pg", 0.5, 0.9)
    assert load_config(bare, ["objective.beta=0.1", "objective.kind=gjs"]).objective.beta == 0.1


def test_the_default_objective_is_topk_pg_with_the_documented_numbers(tmp_path):
    config = load_config(written(tmp_path, GOOD.split("[objective]", maxsplit=1)[0]))
    expected = {"kind": "topk_pg", "beta": 0.5, "lam": 0.3, "gamma": 0.0, "support": "teacher"}
    assert config.objective.model_dump() == expected
    assert (config.learner.learning_rate(lora=False), config.learner.learning_rate(lora=True)) == (2e-6, 1e-4)
    assert (config.k, config.max_staleness, config.learner.importance.cap) == (20, 1, 2.0)
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (64, 4)


def test_another_kind_keeps_the_keys_that_it_shares_and_says_which_it_leaves_out(tmp_path):
    path = written(tmp_path, GOOD.replace('"gjs"', '"topk_pg"') + "lam = 0.7\n")
    for overrides, beta in ((["objective.kind=gjs"], 0.3), (["objective.beta=0.2", "objective.kind=gjs"], 0.2)):
        said = []
        assert load_config(path, overrides, said.append).objective.model_dump(include={"kind", "beta"}) == {
            "kind": "gjs",
            "beta": beta,
        }
        assert said == [
            "--set objective.kind=gjs: dropped lam of [objective], which gjs does not share; kept beta = 0.3"
        ]
    said = []
    taid = written(tmp_path, GOOD.replace('kind = "gjs"\nbeta = 0.3', 'kind = "taid"\nalpha = 0.25'))
    assert load_config(taid, ["objective.kind=eopd"], said.append).objective.alpha == 1.0, "another alpha altogether"
    assert said == ["--set objective.kind=eopd: dropped alpha of [objective], which eopd does not share"]
    with pytest.raises(ConfigError, match=r"objective kind 'gjs' has no key 'lam' \(--set objective.lam=0.2\)"):
        load_config(path, ["objective.kind=gjs", "objective.lam=0.2"])


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (GOOD.replace("steps", "stesp"), [], r"unknown config key 'stesp' \(.*run.toml\); did you mean 'steps'\?"),
        (GOOD.replace("beta = 0.3", "beta = 1.5"), [], r"config key 'objective.beta'.*got 1.5.*less than or equal"),
        (GOOD.replace('"gjs"', '"jsd"'), [], r"config key 'objective.kind'.*jsd.*scalar_kl.*gjs.*topk_pg"),
        (
            GOOD.replace('"gjs"', '"topk_pg"') + "lamda = 1\n",
            [],
            r"'topk_pg' has no key 'lamda'.*'objective.lam'\?",
        ),
        (
            GOOD.replace('kind = "gjs"', "lamda = 1"),
            [],
            r"objective kind 'topk_pg' has no key 'lamda'.*'objective.lam'\?",
        ),
        (GOOD.replace('kind = "gjs"', "lam = 2"), [], r"config key 'objective.lam'.*got 2"),
        (GOOD + "lam = 0.3\n", [], r"objective kind 'gjs' has no key 'lam' \(.*run.toml\); remove objective.lam"),
        (GOOD.replace("[teacher]", "[teachr]"), [], r"teachr"),
        (GOOD + "[teachers.maths]\nurl = 'http://x'\n", [], r"either a \[teacher\] table or \[teachers.NAME\]"),
        (GOOD, ["steps"], r"--set takes key=value: got steps"),
        (GOOD, ["steps.deep=1"], r"steps is a value, not a table"),
        (GOOD, ["steps=many"], r"config key 'steps'.*got 'many', expected a whole number"),
        ("steps = ", [], r"not TOML"),
        ("steps = " + "[" * 5000, [], r"cannot be read .*nested too deeply"),
        ("steps = " + "9" * 5000, [], r"cannot be read .*thousands of digits"),
        (GOOD, ["steps=" + "[" * 5000], r"config key 'steps'.*expected a whole number"),
        (GOOD, ["rollout.prompts_per_step=99999999999"], r"at most 1,000,000 completions per step"),
        (GOOD, ["learner.lr=1e300"], r"config key 'learner.lr'.*less than or equal to 1000000"),
        (GOOD, [f"steps={10**20}"], r"config key 'steps'.*less than or equal to 1000000000"),
        (GOOD, ["seed=-1"], r"config key 'seed'.*got -1"),
        (GOOD, ["learner.lr=inf"], r"config key 'learner.lr'.*finite"),
        (GOOD, ["learner.weight_decay=inf"], r"config key 'learner.weight_decay'.*finite"),
        (GOOD, ["learner.betas=[1.5,0.9]"], r"config key 'learner.betas.0'.*got 1.5.*less than 1"),
    ],
)
def test_a_bad_config_is_one_clear_line(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(written(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=many"], r"config key 'steps' \(--set steps=many\): got 'many', expected a whole number$"),
        (
            ["learner.lr=fast", "k=4"],
            r"config key 'learner.lr' \(--set learner.lr=fast\): got 'fast', expected a number$",
        ),
        (
            ["objective.lam=2"],
            r"objective kind 'gjs' has no key 'lam' \(--set objective.lam=2\); remove objective.lam$",
        ),
        (["rollout.overlong=cut"], r"'rollout.overlong' \(--set .*\): got 'cut', expected 'drop' or 'error'$"),
        (["data=x"], r"config key 'data' \(--set data=x\): got 'x', expected a table$"),
        (["stepz=3"], r"unknown config key 'stepz' \(--set stepz=3\); did you mean 'steps'\?$"),
        (["learner.betas=[0.9]"], r"config key 'learner.betas.1' is missing \(--set learner.betas=\[0.9\]\)$"),
        (["teacher.kind=self"], r"config key 'teacher' \(--set teacher.kind=self\).*no url for kind 'self'$"),
        (["eval.every=3"], r"config key 'eval.path' is missing \("),
    ],
)
def test_a_mistake_on_the_command_line_is_blamed_on_its_set_in_plain_words(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, GOOD), overrides)


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ({"kind": "local"}, {}, "a model folder"),
        ({"kind": "server"}, {}, "a url"),
        ({"kind": "self", "model": "x"}, {}, "the teacher is the student"),
        ({"kind": "local", "model": "x", "vocab_size": 9}, {}, "no vocab_size for kind 'local'"),
        ({"url": "http://x", "vocab_size": 0}, {}, "greater than 0|above 0|at least 1"),
        ({"kind": "self", "ema": 0.9}, {}, "max_staleness = 0"),
        ({"kind": "self", "ema": 0.9}, {"max_staleness": 0, "cache": {"path": "c"}}, r"cannot have a \[cache\]"),
        ({"url": "http://x"}, {"data": {"path": "p", "privileged": {"hint": "use it"}}}, r"\{hint\} in the template"),
        ({"url": "http://x"}, {"eval": {"path": "p", "best": "accuracy"}}, "a scorer"),
        ({"url": "http://x"}, {"eval": {"path": "p", "samples": 4}}, "temperature above 0"),
        ({"url": "http://x"}, {"eval": {"path": "p", "every": 4}, "eval_every": 5}, "are different numbers"),
        (
            {"url": "http://x"},
            {"eval_every": 5},
            r"^eval_every measures nothing without \[eval\]: add \[eval\] with path",
        ),
    ],
)
def test_what_makes_no_sense_together_is_refused_with_the_reason(teacher, changes, message):
    values = {"student": {"model": "m"}, "data": {"path": "p"}, "teacher": teacher, **changes}
    with pytest.raises(ConfigError, match=message):
        validate_config(RunConfig, values, where="run.toml")


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert load_config(path).steps == 7


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*No such file"):
        load_config(tmp_path / "none.toml")


def test_a_key_is_named_by_variable_and_never_stands_in_the_saved_config(tmp_path, monkeypatch):
    config = load_config(written(tmp_path, GOOD), ["teacher.api_key_env=TEACHER_KEY"])
    with pytest.raises(ConfigError, match=r"TEACHER_KEY .* is not set"):
        config.teacher.api_key()
    monkeypatch.setenv("TEACHER_KEY", "very-secret")
    assert config.teacher.api_key().get_secret_value() == "very-secret"
    assert "very-secret" not in json.dumps(config.model_dump(mode="json")) + repr(config)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.api_key_env=sk-hunter2", r"--set teacher.api_key_env=\*\*\*\): expected the name of an environment"),
        ("teacher.api_key=sk-hunter2", r"unknown config key 'teacher.api_key' .*into api_key_env"),
    ],
)
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_repeated(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(written(tmp_path, GOOD), [override])
    assert "hunter2" not in str(caught.value)


def test_an_option_that_holds_the_key_itself_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="--api-key-env: expected the name of an environment variable") as caught:
        read_api_key("sk-hunter2", source="--api-key-env")
    assert "hunter2" not in str(caught.value)


def test_a_password_in_a_url_is_refused_before_anything_is_saved_and_not_repeated(tmp_path):
    with pytest.raises(
        ConfigError, match=r"config key 'teacher.url'.*without user name and password.*api_key_env"
    ) as caught:
        load_config(written(tmp_path, GOOD.replace("http://", "http://me:hunter2@")))
    assert "hunter2" not in str(caught.value)


def test_keys_that_do_not_go_together_are_told_in_one_sentence(tmp_path):
    path = written(tmp_path, GOOD.split("[objective]", maxsplit=1)[0])
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["learner.importance.kind=ppo"])
    assert str(caught.value).startswith("ppo clips the ratios of sampled tokens, and topk_pg also sums over")
    assert "got a table" not in str(caught.value)
