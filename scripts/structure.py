"""Counts what makes a tree hard to live in, and lists the places: ``python scripts/structure.py [folder]``.

* folders with more than 15 modules;
* functions with more than 8 parameters (typer's commands and the public losses excepted: their options are their use);
* functions of more than 60 lines (of the public losses without the docstring: it describes each of a dozen options);
* public names that are defined in two files, so that a reader has to ask which one is meant;
* names that say nothing: participles without their noun (``told``, ``said``, ``given`` ...).
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MOST_FILES, MOST_PARAMETERS, MOST_LINES = 15, 8, 60
PUBLIC_LOSSES = ("topkd/topk/losses/", "topkd/topk/fused/")
MANY_PARAMETERS = ("topkd/cli/commands/", *PUBLIC_LOSSES)
VAGUE = {"told", "said", "heard", "met", "given", "one", "theirs"}


@dataclass(slots=True)
class Findings:
    """Places by rule."""

    crowded: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    vague: list[str] = field(default_factory=list)
    lines: int = 0
    files: int = 0

    def broken(self) -> list[str]:
        """Everything that a test refuses."""
        return [*self.crowded, *self.parameters, *self.long, *self.twice, *self.vague]


def inspect(root: Path, folder: str = "topkd") -> Findings:
    """Look at every module below ``root / folder``."""
    found, homes = Findings(), defaultdict(list)
    modules = sorted((root / folder).rglob("*.py"))
    crowded = Counter(path.parent for path in modules if path.name != "__init__.py")
    found.crowded = [
        f"{place.relative_to(root)}: {count} files" for place, count in crowded.items() if count > MOST_FILES
    ]
    for path in modules:
        source, where = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        found.lines += source.count("\n")
        found.files += 1
        tree = ast.parse(source)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            ):
                homes[node.name].append(where)
        for name, node in _functions(tree):
            count, size = _parameters(node), node.end_lineno - node.lineno + 1
            if where.startswith(PUBLIC_LOSSES) and ast.get_docstring(node) is not None:
                size -= node.body[0].end_lineno - node.body[0].lineno + 1
            if count > MOST_PARAMETERS and not where.startswith(MANY_PARAMETERS):
                found.parameters.append(f"{where}:{node.lineno} {name}: {count} parameters")
            if size > MOST_LINES:
                found.long.append(f"{where}:{node.lineno} {name}: {size} lines")
        for line, name in sorted(set(_vague(tree))):
            found.vague.append(f"{where}:{line} {name}")
    for name, places in sorted(homes.items()):
        if len(set(places)) > 1:
            found.twice.append(f"{name}: {', '.join(dict.fromkeys(places))}")
    return found


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            overload = any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)
            if not overload:
                yield prefix + node.name, node
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        else:
            yield from _functions(node, prefix)


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return sum(argument.arg not in {"self", "cls"} for argument in every)


def _vague(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        name = (
            node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            else node.arg if isinstance(node, ast.arg)
            else node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            else node.attr if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            else ""
        )  # fmt: skip
        if re.sub(r"^_+", "", name) in VAGUE:
            yield node.lineno, name


def main() -> None:
    folder = sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "topkd"
    found = inspect(Path(__file__).parents[1], folder)
    for title, places in (
        (f"folders of more than {MOST_FILES} files", found.crowded),
        (f"functions of more than {MOST_PARAMETERS} parameters", found.parameters),
        (f"functions of more than {MOST_LINES} lines", found.long),
        ("public names in two files", found.twice),
        ("names that say nothing", found.vague),
    ):
        print(f"{len(places)} {title}")
        for place in places:
            print(f"  {place}")
    print(f"{found.lines} lines in {found.files} files")


if __name__ == "__main__":
    main()
