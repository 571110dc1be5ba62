"""Breaks each formula of ``topkd.topk`` in turn and shows that a test fails.

A mutation is one replacement in one source file; ``mutations.toml`` beside this script lists them. Each is applied to a
temporary copy of the package and its tests, the named tests run there, and a mutation that they let pass is a survivor:
the command then fails. A mutation whose old text is not in the file exactly once is an error, so the list cannot rot
unseen.

    python scripts/mutate_maths.py                 all of them (minutes)
    python scripts/mutate_maths.py --only union    those whose name or module contains "union"
    python scripts/mutate_maths.py --list
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from dataclasses import dataclass
from pathlib import Path

import hypothesis  # noqa: F401 - what every test imports is imported once: the tests run in forks of this process
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PYTEST = (
    "-q",
    "-x",
    "--no-header",
    "-p",
    "no:cacheprovider",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
    "-m",
    "not slow",
)
LONGEST_S = 600


@dataclass(frozen=True)
class Mutation:
    name: str
    module: str  # under topkd/topk
    old: str
    new: str
    tests: tuple[str, ...]  # names of tests/topk/**/test_*.py

    @property
    def file(self) -> str:
        return f"topkd/topk/{self.module}.py"

    def applied(self, source: str) -> str:
        found = source.count(self.old)
        if found != 1:
            raise SystemExit(f"{self.name}: the old text stands {found} times in {self.file}, expected once")
        return source.replace(self.old, self.new)


def mutations() -> list[Mutation]:
    listed = tomllib.loads(Path(__file__).with_name("mutations.toml").read_text(encoding="utf-8"))["mutation"]
    return [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in listed]


def copied(target: Path) -> Path:
    """The package and the tests of its maths, in a folder of their own."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis")
    shutil.copytree(ROOT / "topkd", target / "topkd", ignore=skip)
    (target / "tests").mkdir()
    for name in ("topk", "golden"):
        shutil.copytree(ROOT / "tests" / name, target / "tests" / name, ignore=skip)
    shutil.copy(ROOT / "tests" / "__init__.py", target / "tests")
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def _tested(folder: Path, tests: tuple[str, ...]) -> int:
    signal.alarm(LONGEST_S)
    with (folder / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        return int(
            pytest.main(
                [*PYTEST, *(str(path) for name in tests for path in Path("tests/topk").rglob(f"test_{name}.py"))]
            )
        )
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@dataclass(frozen=True)
class Trial:
    """The tests of one mutation (None: of no mutation) in a copy, running in a fork of this process."""

    mutation: Mutation | None
    folder: Path
    source: str
    pid: int
    start: float

    @classmethod
    def of(cls, folder: Path, mutation: Mutation | None, tests: tuple[str, ...]) -> Trial:
        source = ""
        if mutation is not None:
            source = (folder / mutation.file).read_text(encoding="utf-8")
            (folder / mutation.file).write_text(mutation.applied(source), encoding="utf-8")
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                code = _tested(folder, tests)
            finally:
                os._exit(code)  # nothing of the parent's is left again, its temporary folder least of all
        return cls(mutation, folder, source, pid, time.perf_counter())

    def result(self, status: int) -> str | None:
        """The first test that failed, None where all passed; the copy is whole again."""
        if self.mutation is not None:
            (self.folder / self.mutation.file).write_text(self.source, encoding="utf-8")
        said = (self.folder / "output").read_text(encoding="utf-8")
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, 1):
            raise SystemExit(f"pytest could not run for {self.mutation} (exit {code}):\n{said}")
        if code == 0:
            return None
        failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else "?"


def survivors(chosen: list[Mutation], copies: list[Path]) -> int:
    """How many mutations their tests let pass; one copy a trial, as many trials at a time as there are copies."""
    running: dict[int, Trial] = {}
    survived, waiting, free = 0, chosen[::-1], list(copies)
    while waiting or running:
        while waiting and free:
            mutation = waiting.pop()
            trial = Trial.of(free.pop(), mutation, mutation.tests)
            running[trial.pid] = trial
        pid, status = os.wait()
        trial = running.pop(pid)
        by = trial.result(status)
        free.append(trial.folder)
        survived += by is None
        name = "" if trial.mutation is None else trial.mutation.name
        told = f"SURVIVED {name}" if by is None else f"killed   {name}  <- {by}"
        print(f"{time.perf_counter() - trial.start:5.1f} s  {told}", flush=True)
    return survived


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose name or module contains this")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="how many at a time")
    options = parser.parse_args(arguments)
    chosen = [m for m in mutations() if options.only in m.name or options.only in m.module]
    for mutation in chosen:  # before any time is spent: every old text must still be there
        mutation.applied((ROOT / mutation.file).read_text(encoding="utf-8"))
    if options.list:
        print("\n".join(f"{mutation.file}: {mutation.name}" for mutation in chosen))
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="topkd-mutants-") as name:
        copies = [copied(Path(name) / str(job)) for job in range(options.jobs)]
        tests = tuple(sorted({test for mutation in chosen for test in mutation.tests}))
        if tests:
            whole = Trial.of(copies[0], None, tests)
            if by := whole.result(os.waitpid(whole.pid, 0)[1]):
                raise SystemExit(f"the tests fail without any mutation: {by}")
        survived = survivors(chosen, copies)
    print(f"{len(chosen) - survived} of {len(chosen)} mutations killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
