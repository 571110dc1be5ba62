"""What a served teacher's scores are filed under: one name for all the ways to write the path of its folder."""

from __future__ import annotations

import posixpath
from dataclasses import replace
from pathlib import Path

import numpy as np

from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.records import IDENTITY
from topkd.offline.tables import close_all, read_tables, teachers_of
from topkd.topk.errors import ConfigError


def served_name(name: str) -> str:
    """A served name in one spelling.

    Servers call a model by the path it was started with: ``./models/teacher/`` and ``models/teacher`` are one folder.
    Where a relative path begins only the server knows, so nothing more is made equal.
    """
    if not name.strip() or "://" in name:
        return name  # refused where it becomes an identity
    return posixpath.normpath(name)


def served_identity(store: ScoreStore, name: str, revision: str = "") -> TeacherIdentity:
    """Who a server is, to this cache.

    A cache that was begun under another spelling of the name goes on under it: what was paid for stays found.

    Args:
        store: Where the scores are, or will be.
        name: As the server, or the user, says it.
        revision: Of the weights behind it.
    """
    wanted = TeacherIdentity(served_name(name), revision=revision)
    if not revision and not wanted.name.strip("./"):
        raise ConfigError(
            "a served name that says nothing of the model", got=repr(name),
            hint="name its weights with a revision, or serve it under a name of its own",
        )  # fmt: skip
    held = {record.identity() for record in store.records(kinds=(IDENTITY,), live=False)}
    spelt = [one for one in held if replace(one, name=served_name(one.name)) == wanted]
    return wanted if wanted in spelt or not spelt else min(spelt, key=TeacherIdentity.to_json)


def identities_with(path: Path, kind: int) -> dict[TeacherIdentity, int]:
    """Whose records of a kind a cache holds, each with the widest K of them."""
    segments, table = read_tables(path)
    try:
        names, rows = teachers_of(segments, table), table[table["kind"] == kind]
        tags = [tag for tag in np.unique(rows["tag"]).tolist() if tag in names]
        widest = {names[tag]: int(rows["asked"][rows["tag"] == tag].max()) for tag in tags}
        return dict(sorted(widest.items(), key=lambda one: one[0].to_json()))
    finally:
        close_all(segments)
