"""A process that writes into a cache until it is killed or refused (run by test_faults.py)."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.offline.samples import scored
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.topk.errors import CacheError

TEACHER = TeacherIdentity("fault teacher")


def item(number: int):
    """The number-th sequence: small ones and, every seventh, one of 60 KB."""
    return scored(number, tokens=300 if number % 7 == 0 else 12, k=40 if number % 7 == 0 else 4, vocabulary=5_000)


def write(root: str, acks: str, seed: int, total: int) -> None:
    """Writes all items in an order of its own; says which are acknowledged, after they are."""
    order = np.random.default_rng(seed).permutation(total)
    log = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    print("ready", flush=True)
    with ScoreStore(root, mode="a", group_records=10_000, segment_bytes=400_000) as store:
        pending: list[int] = []

        def acknowledge() -> None:
            store.commit()
            os.write(log, "".join(f"{number}\n" for number in pending).encode())
            pending.clear()

        for number in map(int, order):
            store.put(TEACHER, *item(number))
            pending.append(number)
            if len(pending) == 8:
                acknowledge()
        acknowledge()
    print("done", flush=True)


def fill(root: str, limit: int, total: int) -> None:
    """Writes until the file size limit refuses; prints the acknowledged number and the error."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    store, acknowledged = ScoreStore(root, mode="a"), 0
    for number in range(total):
        try:
            store.put(TEACHER, *item(number))
            store.commit()
        except CacheError as error:
            print(acknowledged, error, flush=True)
            store.close()
            return
        acknowledged = number + 1
    print(acknowledged, "no error", flush=True)


def readonly(root: str) -> None:
    """Tries to write into a folder that may only be read; prints what was read and the error."""
    os.chdir(root)
    known, unknown = item(1), item(99)  # imports what it needs before the rights are gone
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    with ScoreStore(".", mode="a") as store:
        found = store.get(TEACHER, known[0], 5, 4) is not None
        try:
            store.put(TEACHER, *unknown)
        except CacheError as error:
            print(found, error, flush=True)
        else:
            print(found, "no error", flush=True)


if __name__ == "__main__":
    command, arguments = sys.argv[1], sys.argv[2:]
    if command == "write":
        write(arguments[0], arguments[1], int(arguments[2]), int(arguments[3]))
    elif command == "fill":
        fill(arguments[0], int(arguments[1]), int(arguments[2]))
    else:
        readonly(arguments[0])
