"""Writes docs/tree.md: every module of the package with the first line of its docstring. ``--check`` only compares."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tree.md"
HEAD = """# The tree, file by file

The first line of each module's docstring, as `python scripts/tree.py` finds it; a test keeps this page up to date.
"""


def summary(path: Path) -> str:
    """First line of a module's docstring, without its full stop."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = doc.strip().splitlines()[0] if doc.strip() else ""
    if not line:
        raise SystemExit(f"{path.relative_to(ROOT)}: a module docstring says what the module is")
    return line.rstrip(".")


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    package = ROOT / "topkd"
    folders = sorted({path.parent for path in package.rglob("*.py") if "__pycache__" not in path.parts})
    for folder in folders:
        name = folder.relative_to(ROOT).as_posix()
        parts.append(f"## {name}\n\n{summary(folder / '__init__.py')}.\n")
        rows = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        if rows:
            lines = [f"| `{path.name}` | {summary(path).replace('|', chr(92) + '|')} |" for path in rows]
            parts.append("\n".join(["| file | what it is |", "|---|---|", *lines]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit("docs/tree.md is out of date: run `python scripts/tree.py`")
    else:
        PAGE.write_text(text, encoding="utf-8")
