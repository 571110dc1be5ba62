"""Finds every fenced code block of the documents, and what is to be done with it.

A block whose language is in ``RUNNABLE`` is run by ``test_blocks.py``. An HTML comment directly above it may say more::

    <!-- no-run: reason -->     not run, for that reason (a server that is not here, a command that never ends)
    <!-- slow -->               run by `make test-slow` instead of `make test`
    <!-- repo -->               run in the repository's root instead of an empty folder
    <!-- continues -->          runs after the document's earlier blocks of the same language, as one program;
                                those are not run on their own again
    <!-- server -->             run with a tiny model behind the embedded server in place of SERVER_URL

Words combine with commas: ``<!-- slow, repo -->``. ``python -m tests.docs.blocks`` prints the counts.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNNABLE = {"bash": "bash", "sh": "bash", "shell": "bash", "console": "console", "python": "python", "py": "python"}
RUNNABLE |= {"toml": "toml", "json": "json"}
WORDS = {"slow", "repo", "continues", "server"}
SERVER_URL = "http://127.0.0.1:8000"  # what documents call the reader's own server

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})[ \t]*(?P<info>[^`\n]*)$")
_COMMENT = re.compile(r"^ *<!--(?P<text>.*?)-->\s*$")


class BlockError(ValueError):
    """A document that the runner cannot make sense of; the message names file and line."""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. ``kind`` is "" for text that is only read; ``reason`` is not empty for a no-run block."""

    path: Path
    line: int
    language: str
    code: str
    words: frozenset[str]
    reason: str
    prelude: str = ""

    @property
    def kind(self) -> str:
        return RUNNABLE.get(self.language, "")

    @property
    def name(self) -> str:
        shown = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{shown}:{self.line}:{self.language}"

    @property
    def program(self) -> str:
        return self.prelude + self.code


def documents() -> list[Path]:
    """Everything a reader may copy a command from."""
    top = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "AGENTS.md")]
    below = [path for folder in ("docs", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.md")]
    return [path for path in top if path.exists()] + sorted(below)


def blocks_of(path: Path) -> list[Block]:
    """The blocks of one document, in order."""
    found: list[Block] = []
    comment = ""
    lines = iter(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        fence = _FENCE.match(line)
        if fence is None:
            note = _COMMENT.match(line)
            if note is not None:
                comment = note["text"].strip()
            elif line.strip():
                comment = ""
            continue
        code = _body(path, number, fence, lines)
        found.append(_block(path, number, fence["info"].split(), code, comment, found))
        comment = ""
    return found


def all_blocks() -> list[Block]:
    """Every block of every document."""
    return [block for path in documents() for block in blocks_of(path)]


def ends_of_chains(blocks: list[Block]) -> list[Block]:
    """Leave out the blocks that a later one, of the same speed, runs again before its own code."""
    again = {(block.path, block.kind, "slow" in block.words, block.prelude) for block in blocks}
    return [
        block for block in blocks if (block.path, block.kind, "slow" in block.words, block.program + "\n") not in again
    ]


def _body(path: Path, number: int, fence: re.Match[str], lines: enumerate[str]) -> str:
    closing = re.compile(rf"^ *{re.escape(fence['ticks'][0])}{{{len(fence['ticks'])},}}\s*$")
    indent = len(fence["indent"])
    body: list[str] = []
    for _, line in lines:
        if closing.match(line):
            return "\n".join(body) + "\n"
        body.append(line[indent:] if not line[:indent].strip() else line)
    raise BlockError(f"{path}:{number}: the fence is never closed")


def _block(path: Path, number: int, info: list[str], code: str, comment: str, earlier: list[Block]) -> Block:
    if not info:
        raise BlockError(f"{path}:{number}: the fence names no language; write ```bash, ```python, ```toml or ```text")
    language = info[0].lower()
    words, reason = _directives(path, number, comment)
    prelude = ""
    if "continues" in words:
        same = [block for block in earlier if block.kind == RUNNABLE.get(language) and not block.reason]
        if not same:
            raise BlockError(f"{path}:{number}: <!-- continues --> has no earlier block of its language that runs")
        prelude = same[-1].program + "\n"
    return Block(path, number, language, code, words, reason, prelude)


def _directives(path: Path, number: int, comment: str) -> tuple[frozenset[str], str]:
    if comment.startswith("no-run"):
        reason = comment.removeprefix("no-run").lstrip(": ").strip()
        if not reason:
            raise BlockError(f"{path}:{number}: <!-- no-run --> needs its reason: <!-- no-run: reason -->")
        return frozenset(), reason
    words = frozenset(word.strip() for word in comment.split(",") if word.strip())
    if words & WORDS and words - WORDS:
        raise BlockError(f"{path}:{number}: unknown words {sorted(words - WORDS)} in <!-- {comment} -->")
    return words & WORDS, ""


def count(blocks: list[Block]) -> str:
    """The counts, and each block that is not run with its reason."""
    runnable = [block for block in blocks if block.kind]
    skipped = [block for block in runnable if block.reason]
    slow = [block for block in runnable if "slow" in block.words]
    kinds = Counter(block.language for block in runnable)
    lines = [
        f"docs: {len(runnable)} command blocks in {len({block.path for block in runnable})} documents ("
        + ", ".join(f"{number} {language}" for language, number in sorted(kinds.items()))
        + f"): {len(runnable) - len(skipped) - len(slow)} run in make test, {len(slow)} in make test-slow, "
        + f"{len(skipped)} not run"
    ]
    return "\n".join(lines + [f"  not run: {block.name}: {block.reason}" for block in skipped])


if __name__ == "__main__":
    try:
        sys.stdout.write(count(all_blocks()) + "\n")
    except (BlockError, json.JSONDecodeError) as problem:
        sys.exit(f"docs: {problem}")
