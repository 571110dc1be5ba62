"""Renders the page: one HTML file that needs no other file and runs no other code.

A content security policy allows only this style and this script, by their hashes. Text that a model has written into a
run log could not run or load anything, even if the escaping failed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Any

from topkd.report.page.content import Page
from topkd.report.page.palette import write_stylesheet

FRAGMENTS = ("verdict", "completions", "summary", "settings", "notes")
SCRIPTS = ("core", "scales", "lines", "bars", "strips", "explorer", "tables", "main")


def render_page(page: Page, *, live: bool = False) -> str:
    """Render a page as HTML. With ``live`` it requests updates from its server; otherwise it makes no request."""
    style, script = _style(), _script()
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        f"connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}; base-uri 'none'; form-action 'none'"
    )
    html: str = _template("page.html").render(
        page=page,
        style=style,
        script=script,
        policy=policy,
        data=escape_json(json.dumps(page.data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))),
        bodies=[] if live else [escape_json(body) for body in page.transcripts.bodies],
        live=live,
    )
    return html


def render_fragments(page: Page) -> dict[str, str]:
    """Render the text parts of the page, which a live page replaces: element id -> HTML."""
    return {name: _template(f"{name}.html").render(page=page) for name in FRAGMENTS}


def escape_json(text: str) -> str:
    """Escape JSON for a script element: every character that could end the element or begin a comment."""
    return (
        text.replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("topkd.report.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template(name: str) -> Any:
    return _environment().get_template(name)


@cache
def _style() -> str:
    return write_stylesheet() + _asset("page.css")


@cache
def _script() -> str:
    return "(() => {\n'use strict';\n" + "\n".join(_asset(f"{name}.js") for name in SCRIPTS) + "})();\n"


def _asset(name: str) -> str:
    return (files("topkd.report.page") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
