"""Memory that a report takes for a run with many recorded rollouts, against the size of its ``tokens.jsonl``.

Each page is made in a process of its own, in turns; what counts is its peak resident memory above that of the same
process for a run without rollouts. The side called "parsed" holds every line as parsed JSON, as reports once did.

    python benchmarks/bench_report_memory.py [--megabytes 8 80]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from replies import machine  # noqa: E402

from tests.report.made import rollout, token, write_run  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "report_memory.json"


def make_run(folder: Path, megabytes: float) -> Path:
    """A run whose rollouts of 512 tokens, with both lists of 20, take that much."""
    path = write_run(folder, rollouts=0)
    tokens = [token(i, f" word{i % 97}", k=20) for i in range(512)]
    with (path / "tokens.jsonl").open("w", encoding="utf-8") as file:
        step = 0
        while file.tell() < megabytes * 1e6:
            step += 1
            file.write(json.dumps(rollout(step) | {"tokens": tokens}) + "\n")
    return path


def make_page(path: Path, side: str) -> None:
    """Make the page in this process, or parse and hold every line; print peak memory and CPU time."""
    from topkd.report.load.collection import gather
    from topkd.report.page.content import build_content
    from topkd.report.page.html import render_page

    held = []
    if side == "parsed":
        data = (path / "tokens.jsonl").read_bytes()
        held = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]]
    else:
        held.append(render_page(build_content(gather([path]))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "cpu_s": time.process_time(), "held": len(held)}))


def measure(path: Path, side: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--page", str(path), side], capture_output=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[8, 80])
    parser.add_argument("--page", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.page:
        make_page(Path(asked.page[0]), asked.page[1])
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        empty = make_run(Path(name) / "empty", 0)
        for megabytes in asked.megabytes:
            path = make_run(Path(name) / str(megabytes), megabytes)
            size = (path / "tokens.jsonl").stat().st_size
            for side in ("page", "parsed"):
                base, got = measure(empty, side), measure(path, side)
                taken = got["peak"] - base["peak"]
                rows.append(
                    {
                        "side": side,
                        "file_mb": round(size / 1e6, 1),
                        "peak_mb": round(taken / 1e6, 1),
                        "of_file": round(taken / size, 2),
                        "cpu_s": round(got["cpu_s"] - base["cpu_s"], 2),
                    }
                )
                print(rows[-1])
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
