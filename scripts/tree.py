"""Writes docs/tree.md: every module of the package with the first line of its docstring. ``--check`` only compares."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tree.md"
HEAD = """# The tree, file by file

What is in each folder, and in each file? Each line below is the first line of a module's docstring;
`python scripts/tree.py` writes this page. [CONTRIBUTING](../CONTRIBUTING.md#where-things-go) says where to start.
"""


def summarize(path: Path) -> str:
    """Return the first line of a module's docstring, without its full stop."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = doc.strip().splitlines()[0] if doc.strip() else ""
    if not line:
        raise SystemExit(f"{path.relative_to(ROOT)}: a module docstring says what the module is")
    return line.rstrip(".").replace("|", "\\|")


def build_page() -> str:
    """Build the whole page: the folders in one table, then the files of each."""
    package = ROOT / "topkd"
    folders = sorted({path.parent for path in package.rglob("*.py") if "__pycache__" not in path.parts})
    overview, parts = [], []
    for folder in folders:
        name, about = folder.relative_to(ROOT).as_posix(), summarize(folder / "__init__.py")
        overview.append(f"| [`{name}`](#{name.replace('/', '')}) | {about} |")
        parts.append(f"## {name}\n\n{about}.\n")
        rows = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        if rows:
            lines = [f"| `{path.name}` | {summarize(path)} |" for path in rows]
            parts.append("\n".join(["| file | what it is |", "|---|---|", *lines]) + "\n")
    return "\n".join([HEAD, "\n".join(["| folder | what it is |", "|---|---|", *overview]) + "\n", *parts])


if __name__ == "__main__":
    text = build_page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit("docs/tree.md is out of date: run `python scripts/tree.py`")
    else:
        PAGE.write_text(text, encoding="utf-8")
