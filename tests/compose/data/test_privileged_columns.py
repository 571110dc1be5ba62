"""Templates for what only the teacher sees need a row that has something to tell, before anything trains."""

import json

import pytest
from typer.testing import CliRunner

from tests.engine.pieces import model_folder
from topkd.cli.app import app
from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.prompts import load_prompts
from topkd.compose.progress import Progress
from topkd.topk.errors import DataError


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("told") / "student", seed=1)


def config(student, tmp_path, rows, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": str(student), "device": "cpu"}
    return RunConfig.model_validate(
        {"student": values, "teacher": {"kind": "self"}, "data": {"path": str(path), **data}}
    )


HINTS = {"hint": "{hint}"}


@pytest.mark.parametrize(
    ("rows", "templates", "words"),
    [
        (
            [{"prompt": "a", "hnit": "b"}, {"prompt": "c", "id": 1}],
            HINTS,
            "no row has a column 'hint' .*hnit, id, prompt",
        ),
        ([{"prompt": "a", "hint": None}], HINTS, "'hint' .*columns prompt;"),
        ([{"prompt_ids": [5]}], HINTS, "'hint' .*columns prompt_ids;"),
        ([{"prompt": "a"}], {"hint": "{hint}", "reference": "{reference}"}, "a column 'reference' or 'hint' "),
        ([{"prompt": "a", "reference": "b"}], HINTS, "'hint' .*columns prompt, reference;"),
    ],
)
def test_a_template_whose_column_no_row_has_is_refused_with_the_columns_there_are(
    student, tmp_path, rows, templates, words
):
    with pytest.raises(DataError, match=words) as caught:
        load_prompts(config(student, tmp_path, rows, privileged=templates), Progress())
    assert "rows.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_without_it_may_stand_beside_one_that_has_it_and_a_function_may_tell_it_later(student, tmp_path):
    def sizes(rows, **data):
        read = load_prompts(config(student, tmp_path, rows, **data), Progress()).rows
        return [row.teacher_prompt_ids.size > row.prompt_ids.size for row in read]

    bare, told = {"prompt": "a"}, {"prompt": "c", "hint": "it is d"}
    assert sizes([bare, told], privileged=HINTS) == [False, True]
    assert sizes([bare, told], privileged={**HINTS, "reference": "{reference}"}) == [False, True]
    assert sizes([bare], privileged={"feedback": "{feedback}"}, feedback="json:dumps") == [False]
    assert sizes([bare]) == [False], "no template was asked for"


def test_a_config_that_was_saved_whole_asks_for_no_more_than_it_did(student, tmp_path):
    plain = config(student, tmp_path, [{"prompt": "a"}])
    assert load_prompts(RunConfig.model_validate(plain.model_dump(mode="json")), Progress()).rows
    asked = config(student, tmp_path, [{"prompt": "a"}], privileged={"hint": "psst: {hint}"})
    with pytest.raises(DataError, match="a column 'hint' for"):
        load_prompts(RunConfig.model_validate(asked.model_dump(mode="json")), Progress())


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_train_and_its_dry_run_say_so_at_the_command_line(student, tmp_path, more):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "hnit": "b"}\n')
    (tmp_path / "run.toml").write_text(
        f"[student]\nmodel = '{student}'\ndevice = 'cpu'\n[teacher]\nkind = 'self'\n"
        f"[data]\npath = '{tmp_path / 'rows.jsonl'}'\n[data.privileged]\nhint = '{{hint}}'\n"
    )
    done = CliRunner().invoke(app, ["train", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out"), *more])
    said = done.output if more else str(done.exception)
    assert "no row has a column 'hint'" in " ".join(said.split())
    assert done.exit_code != 0
    assert not (tmp_path / "out" / "student").exists()
