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
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", "-m", "not slow")


@dataclass(frozen=True)
class Mutation:
    name: str
    module: str  # under topkd/topk
    old: str
    new: str
    tests: tuple[str, ...]  # tests/topk/test_*.py

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


def failure(folder: Path, tests: tuple[str, ...]) -> str | None:
    """The first test that fails, None where all pass."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    command = [*PYTEST, *(f"tests/topk/test_{name}.py" for name in tests)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run {tests} (exit {done.returncode}):\n{done.stdout}{done.stderr}")
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else "?"


def survives(folder: Path, mutation: Mutation) -> bool:
    path = folder / mutation.file
    source = path.read_text(encoding="utf-8")
    start = time.perf_counter()
    path.write_text(mutation.applied(source), encoding="utf-8")
    try:
        by = failure(folder, mutation.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    told = f"SURVIVED {mutation.name}" if by is None else f"killed   {mutation.name}  <- {by}"
    print(f"{time.perf_counter() - start:5.1f} s  {told}", flush=True)
    return by is None


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
    with tempfile.TemporaryDirectory(prefix="topkd-mutants-") as name, ThreadPoolExecutor(options.jobs) as pool:
        free: SimpleQueue[Path] = SimpleQueue()
        for job in range(options.jobs):
            free.put(copied(Path(name) / str(job)))

        def check(mutation: Mutation) -> bool:
            folder = free.get()  # each job breaks a copy of its own
            try:
                return survives(folder, mutation)
            finally:
                free.put(folder)

        whole = copied(Path(name) / "whole")
        tests = sorted({test for mutation in chosen for test in mutation.tests})
        if tests and (by := failure(whole, tuple(tests))):
            raise SystemExit(f"the tests fail without any mutation: {by}")
        survivors = sum(pool.map(check, chosen))
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
