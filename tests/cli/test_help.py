"""Help pages: complete, in 80 columns, with examples that are commands; and what shells complete."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from typing import get_args

import pytest
import typer
from pydantic import ValidationError

from topkd.cli import app as commands
from topkd.cli.commands import probe, sample, score
from topkd.cli.options import CODECS


def _commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


GROUP = typer.main.get_command(commands.app)
ALL = dict(_commands(GROUP))


def topkd(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "topkd", *args], capture_output=True, text=True, check=False, timeout=240,
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"} | env,
    )  # fmt: skip


def test_the_help_lists_every_command_and_the_exit_codes_and_fits_80_columns():
    page = topkd("--help").stdout
    assert max(map(len, page.splitlines())) <= 80
    for path in ALL:
        assert re.search(rf"^│ {path[0]} ", page, re.MULTILINE), path
    assert "Exit codes: 0 done" in page
    assert "130" in page


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_option_says_what_it_does_and_what_stands_for_its_value(path):
    for param in ALL[path].params:
        if param.name == "help":
            continue
        assert param.help, (path, param.name)
        assert param.metavar is not None, (path, param.name)
        # Without a word of ours the page shows the annotation: <list[str]>, <bool>.
        assert bool(param.metavar) != bool(getattr(param, "is_flag", False)), (path, param.name)


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_the_examples_of_every_command_fit_80_columns_and_can_be_called(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^Example: (topkd .*)$", ALL[path].help, re.MULTILINE)
    assert examples, f"topkd {' '.join(path)} --help has no example"
    for example in examples:
        assert len(f" Example: {example}") <= 79, example
        name, *words = shlex.split(example)
        assert (name, tuple(words[: len(path)])) == ("topkd", path)
        ALL[path].make_context(path[-1], words[len(path) :])  # raises where an option or argument does not fit


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_paragraphs_of_a_help_page_break_where_the_terminal_ends_and_nowhere_else(path):
    _first, *others = ALL[path].help.split("\n\n")
    assert not any("\n" in paragraph.strip() for paragraph in others)


def test_what_shells_complete_is_what_the_configs_accept():
    from topkd.clients.dialects.records import DIALECTS
    from topkd.compose.bulk.config import SampleConfig, ScoreConfig

    def accepts(model, dialect, **values):
        try:
            model(dialect=dialect, **values)
        except ValidationError:
            return False
        return True

    names = {"auto", *DIALECTS}
    rows = {"data": "rows.jsonl", "out": "cache", "teachers": ("http://h",)}
    prompts = {"data": "rows.jsonl", "out": "cache", "teacher": "http://h", "tokenizer": "models/teacher"}
    assert set(score.DIALECTS) == {name for name in names if accepts(ScoreConfig, name, **rows)}
    assert set(sample.DIALECTS) == {name for name in names if accepts(SampleConfig, name, **prompts)}
    assert set(probe.DIALECTS) == names
    assert set(CODECS) == set(get_args(ScoreConfig.model_fields["codec"].annotation))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("topkd s", {"score", "sample", "serve"}),
        ("topkd cache ", {"stats", "verify", "ls", "gc", "merge", "export", "import"}),
        ("topkd train run.toml --r", {"--resume"}),
        ("topkd score d --dialect v", {"vllm", "vllm_generate"}),
        ("topkd cache gc c --codec ", {"packed", "raw", "cold"}),
    ],
)
def test_bash_completes_commands_options_and_values(line, expected):
    words = line.split(" ")
    done = topkd(_TOPKD_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert done.returncode == 0
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_of_each_shell_can_be_printed(shell):
    done = topkd("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "_TOPKD_COMPLETE" in done.stdout
