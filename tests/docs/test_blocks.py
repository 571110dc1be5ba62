"""Every command block of the documents does what a reader who copies it expects: it runs, or it parses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, SERVER_URL, Block, BlockError, all_blocks, blocks_of, ends_of_chains
from topkd.topk.errors import ConfigError

FAST_LIMIT_S = 240
SLOW_LIMIT_S = 1200
TOML_FILES = sorted(path for folder in ("examples", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.toml"))


def _cases() -> list[object]:
    marks = (pytest.mark.slow, pytest.mark.timeout(SLOW_LIMIT_S + 60))
    return [
        pytest.param(block, id=block.name, marks=marks if "slow" in block.words else ())
        for block in ends_of_chains([block for block in all_blocks() if block.kind and not block.reason])
    ]


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """Starts the embedded server when the first block asks for it."""
    with contextlib.ExitStack() as stack:

        @cache
        def start() -> str:
            from tests.fakes.tinymodels import make_tiny_model
            from topkd.compose.demo_assets import assets
            from topkd.serve import ServeConfig, ServerProcess

            folder = tmp_path_factory.mktemp("server")
            make_tiny_model(folder / "model")
            # The tokenizer that the pages' own students are made with: a teacher must share it.
            texts = assets.read_texts(assets.list_library_files(400_000))
            assets.train_tokenizer(texts, 2048, folder / "model")
            config = ServeConfig(model=str(folder / "model"), port=0)
            return stack.enter_context(ServerProcess(config, log_path=folder / "server.log")).url

        yield start


@pytest.mark.parametrize("block", _cases())
def test_a_documented_block_works_as_written(block: Block, tmp_path: Path, server_url: Callable[[], str]) -> None:
    if "server" in block.words:
        assert SERVER_URL in block.program, f"{block.name} asks for a server and does not name {SERVER_URL}"
        block = replace(block, prelude="", code=block.program.replace(SERVER_URL, server_url()))
    run_block(block, tmp_path)


def run_block(block: Block, folder: Path) -> None:
    """Raises AssertionError with the block's place and its last words when it does not work."""
    if block.kind == "json":
        json.loads(block.code)
    elif block.kind == "toml":
        load_toml(block.program, block.name)
    elif block.kind == "python":
        script = folder / "block.py"
        script.write_text(block.program, encoding="utf-8")
        _run([sys.executable, "-W", "error::DeprecationWarning:__main__", str(script)], block, folder)
    else:
        code = block.program if block.kind == "bash" else _typed(block)
        _run([shutil.which("bash") or "bash", "-euo", "pipefail", "-c", code], block, folder)


def _typed(block: Block) -> str:
    """What a reader types of a console block: the lines after "$ ", continued after "> ". The rest is output."""
    typed: list[str] = []
    for line in block.program.splitlines():
        if line.startswith("$ ") or (line.startswith("> ") and typed and typed[-1].endswith("\\")):
            typed.append(line[2:])
    assert typed, f"{block.name}: a console block shows what is typed after '$ '"
    return "\n".join(typed)


def load_toml(text: str, where: str) -> None:
    """Parses; what sets anything of a run is validated as a run config, a fragment after completion."""
    tables = tomllib.loads(text)
    from topkd.compose.comparison.config import CompareConfig
    from topkd.compose.config.run_config import RunConfig, validate_config

    if "arms" in tables:
        validate_config(CompareConfig, tables, where=where)
        return
    if not RunConfig.model_fields.keys() & tables.keys():
        return
    rest = {"student": {"model": "m"}, "teacher": {"url": "http://127.0.0.1:8000"}, "data": {"path": "p.jsonl"}}
    if "teachers" in tables:
        del rest["teacher"]
    validate_config(RunConfig, rest | tables, where=where)


def _run(command: list[str], block: Block, folder: Path) -> None:
    home = folder / "home"
    (home / "cache" / "topkd").mkdir(parents=True)
    # An empty home, but for the demo's models, which take a minute of training.
    models = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topkd" / "demo"
    models.mkdir(parents=True, exist_ok=True)
    (home / "cache" / "topkd" / "demo").symlink_to(models, target_is_directory=True)
    work = folder / "work"
    work.mkdir()
    limit_s = SLOW_LIMIT_S if "slow" in block.words else FAST_LIMIT_S
    env = os.environ | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "MPLBACKEND": "Agg",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    # A session of its own, so that a server which the block left running ends with it.
    with subprocess.Popen(
        command,
        cwd=ROOT if "repo" in block.words else work,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            _end(process)
            said, _ = process.communicate()
            pytest.fail(f"{block.name}: still running after {limit_s} s; it said:\n{said[-2000:]}")
        finally:
            _end(process)
    assert process.returncode == 0, f"{block.name}: exit code {process.returncode}; it said:\n{said[-4000:]}"


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _document(folder: Path, text: str) -> list[Block]:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return blocks_of(path)


def test_every_document_can_be_read_and_every_fence_names_its_language() -> None:
    assert all_blocks()


def test_blocks_that_a_later_one_runs_again_are_not_run_twice(tmp_path: Path) -> None:
    kept = "```bash\na\n```\n<!-- continues -->\n```bash\nb\n```\n"
    page = kept + "<!-- continues, slow -->\n```bash\nc\n```\n```bash\nd\n```\n"
    programs = [block.program for block in ends_of_chains(_document(tmp_path, page))]
    assert programs == ["a\n\nb\n", "a\n\nb\n\nc\n", "d\n"]


def test_a_block_that_fails_is_reported_with_its_place(tmp_path: Path) -> None:
    (block,) = _document(tmp_path, "Text.\n\n```bash\nfalse | true\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:3:bash: exit code 1"):
        run_block(block, tmp_path)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("```python\nraise SystemExit(3)\n```", "python"),
        ("```console\n$ exit 4\nexit 0\n```", "console"),
    ],
)
def test_the_exit_code_of_every_kind_of_block_counts(text: str, kind: str, tmp_path: Path) -> None:
    (block,) = _document(tmp_path, text)
    assert block.kind == kind
    with pytest.raises(AssertionError, match=r"exit code [34]"):
        run_block(block, tmp_path)


def test_a_toml_block_that_does_not_parse_is_an_error(tmp_path: Path) -> None:
    (block,) = _document(tmp_path, "```toml\na = \n```")
    with pytest.raises(tomllib.TOMLDecodeError):
        run_block(block, tmp_path)


def test_a_toml_block_with_an_unknown_run_key_is_an_error(tmp_path: Path) -> None:
    fine, wrong = _document(tmp_path, "```toml\nk = 20\n```\n\n```toml\nk = 20\nstepz = 3\n```\n")
    run_block(fine, tmp_path)
    with pytest.raises(ConfigError, match="stepz"):
        run_block(wrong, tmp_path)


def test_every_toml_file_of_the_repository_loads() -> None:
    assert ROOT / "examples" / "compare_scalar_gjs.toml" in TOML_FILES, "the search finds files at all"
    for path in TOML_FILES:
        load_toml(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))


def test_no_run_needs_a_reason_and_binds_only_to_the_block_below(tmp_path: Path) -> None:
    first, second = _document(tmp_path, "<!-- no-run: needs a GPU -->\n```sh\na\n```\n\n```sh\nb\n```\n")
    assert (first.reason, second.reason) == ("needs a GPU", "")
    (apart,) = _document(tmp_path, "<!-- no-run: needs a GPU -->\nWords between.\n```sh\na\n```\n")
    assert apart.reason == ""
    with pytest.raises(BlockError, match="needs its reason"):
        _document(tmp_path, "<!-- no-run -->\n```sh\na\n```\n")


def test_a_fence_without_a_language_or_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BlockError, match="names no language"):
        _document(tmp_path, "```\nmake demo\n```\n")
    with pytest.raises(BlockError, match="never closed"):
        _document(tmp_path, "```bash\nmake demo\n")


def test_a_continued_block_sees_what_the_earlier_ones_made(tmp_path: Path) -> None:
    text = "```python\nx = 41\n```\n\n```sh\ntrue\n```\n\n<!-- continues -->\n```python\nassert x == 41\n```\n"
    *_, last = _document(tmp_path, text)
    run_block(last, tmp_path)


@pytest.mark.slow
def test_a_block_that_needs_a_server_meets_the_embedded_one(tmp_path: Path, server_url: Callable[[], str]) -> None:
    text = (
        "<!-- server -->\n```python\nimport asyncio\nfrom topkd.clients import connect\n\n\nasync def main():\n"
        f"    async with await connect({SERVER_URL!r}) as teacher:\n"
        "        assert (await teacher.score([5, 6, 7], start=1, k=20)).rows == 1\n\n\nasyncio.run(main())\n```\n"
    )
    (block,) = _document(tmp_path, text)
    test_a_documented_block_works_as_written(block, tmp_path, server_url)


def test_indented_fences_and_longer_fences_are_blocks_too(tmp_path: Path) -> None:
    text = "1. step\n\n   ```python\n   if True:\n       assert True\n   ```\n\n````text\n```bash\nfalse\n```\n````\n"
    step, shown = _document(tmp_path, text)
    assert step.code == "if True:\n    assert True\n"
    assert (shown.kind, shown.language) == ("", "text")
