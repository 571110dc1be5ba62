"""Records what the commands compute (demo, train, replay, score), and checks it against a file to the last digit.

    python scripts/golden_runs.py record tests/golden/runs/house.json
    python scripts/golden_runs.py check tests/golden/runs/house.json

A file names the machine that it was recorded on. There ``check`` is exact. Elsewhere rounding differs, and with it what
is sampled after the first update: ``check`` says so, and compares what rounding hardly reaches (see ``differences``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
SHOWN = 20  # differences that are printed

# Not a number of the run: seconds (and every key that ends in _s), traffic, and what it ran on and where.
TRAFFIC = {"requests", "retries", "failed_requests", "cache_hits", "scored_tokens", "teacher_bytes"}
PROVENANCE = {
    "topkd", "revision", "project_revision", "python", "platform", "device", "device_name", "threads", "packages",
    "server_version", "url", "urls", "pid", "out", "seconds", "client",
}  # fmt: skip
DROPPED = TRAFFIC | PROVENANCE

FIRST_STEP_TOLERANCE = 0.05  # relative (absolute below 1), on another machine with the same Python
# Follows from rounding: on another machine only its presence is compared.
ROUNDED = re.compile(
    r"\.(steps\.(?!1\.)\d+|evals\.(?!0\.)\d+|order|alarms|texts|weights|policy|tokens_file|ratio_hist|keys|rows)(\.|\[|$)"
)
CHAOTIC = re.compile(r"\.(order|alarms)(\.|\[|$)")  # not even that: an alarm may be raised here and not there


def main() -> int:
    """The exit code: 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    asked = parser.parse_args()
    golden = json.loads(asked.file.read_text(encoding="utf-8")) if asked.action == "check" else None
    found = run_all()
    if golden is None:
        asked.file.parent.mkdir(parents=True, exist_ok=True)
        asked.file.write_text(canonical(found), encoding="utf-8")
        print(f"recorded {len(dict(leaves(found)))} values in {asked.file}")
        return 0
    same = golden["machine"] == found["machine"]
    if not same:
        print("ANOTHER MACHINE than the file's: not compared to the last digit")
        for path, value in leaves(golden["machine"]):
            print(f"  {path.lstrip('.')}: {value!r} there, {dict(leaves(found['machine'])).get(path)!r} here")
    lines = differences(golden, found)
    for line in lines[:SHOWN]:
        print(line)
    if lines:
        print(f"{len(lines)} differences from {asked.file}")
        return 1
    how = "to the last digit" if same else "as far as another machine can say"
    print(f"{len(dict(leaves(golden)))} values of {asked.file} repeat {how}")
    return 0


def run_all() -> dict[str, Any]:
    """Everything that is compared, from commands run now in a folder of their own."""
    os.environ.update(dict.fromkeys(THREADS, "1"), CUDA_VISIBLE_DEVICES="", NO_COLOR="1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))
    from topkd.serve import ServeConfig, ServerProcess

    with tempfile.TemporaryDirectory(prefix="topkd-golden-") as name:
        here = Path(name).resolve()
        topkd(here, "demo", "--steps", "12", "--seed", "0", "--out", "demo")
        first = here / "demo" / "first-run"
        summary = json.loads((here / "demo" / "demo.json").read_text(encoding="utf-8"))
        found = {
            "machine": machine(),
            "models": {name: weights(first / name / "model.safetensors") for name in ("teacher", "student")},
            "demo": {
                **run_of(here / "demo"),
                "config": json.loads((here / "demo" / "config.json").read_text(encoding="utf-8")),
                "texts": {key: value for key, value in summary.items() if isinstance(value, str)},
            },
        }
        # One sequence a forward pass: what shares a batch depends on timing, and rounding depends on the batch.
        serve = ServeConfig(
            model=str(first / "teacher"), served_model_name="teacher", port=0, device="cpu", max_batch_tokens=1
        )
        every = ["--set", "eval.every=4"]
        run_file = str(first / "run.toml")
        with ServerProcess(serve, log_path=here / "server.log") as server:
            live = ["--set", f"teacher.url={server.url}", "--set", "cache.path=cache"]
            report = topkd(here, "train", run_file, "--out", "train", "--json", *every, *live)
            found["train"] = {
                **run_of(here / "train"),
                "report": without(json.loads(report)),
                "cache": listed(here, "cache"),
            }
            found["score"] = score(here, first, server.url)
        # The server is gone: a replay asks nobody.
        report = topkd(here, "replay", run_file, "--cache", "cache", "--out", "replay", "--json", *every)
        found["replay"] = {**run_of(here / "replay"), "report": without(json.loads(report))}
        return json.loads(json.dumps(found).replace(str(here), "FOLDER").replace(server.url, "URL"))


def score(here: Path, first: Path, url: str) -> dict[str, Any]:
    """A job of 48 rows of text, the job again (all of it cached), and the scores themselves."""
    import pyarrow.parquet as pq

    texts = [json.loads(line)["prompt"] for line in (first / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{"prompt": prompt, "completion": texts[1000 + number]} for number, prompt in enumerate(texts[:48])]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    job = ["score", "rows.jsonl", "--teacher", url, "--out", "scores", "--tokenizer", str(first / "teacher"), "--json"]
    reports = [without(json.loads(topkd(here, *job))) for _ in range(2)]
    topkd(here, "cache", "export", "scores", "exported")
    table = pq.read_table(here / "exported" / "scores.parquet")
    records = sorted(table.to_pylist(), key=lambda row: json.dumps(row, default=str))
    sums = [{name: total(value) for name, value in row.items()} for row in records]
    return {"report": reports[0], "again": reports[1], "cache": listed(here, "scores"), "rows": sums}


def total(value: Any) -> Any:
    """Lists of numbers as their exact sum and a digest; anything else as it is."""
    if not isinstance(value, list):
        return value if isinstance(value, str | int | float | None) else str(value)
    numbers = list(flat(value))
    exact = [number for number in numbers if isinstance(number, int | float) and math.isfinite(number)]
    return {"length": len(numbers), "sum": math.fsum(exact), "sha256": digest(json.dumps(numbers).encode())}


def flat(value: Any) -> Iterator[Any]:
    """Entries of nested lists."""
    for entry in value:
        if isinstance(entry, list):
            yield from flat(entry)
        else:
            yield entry


def listed(here: Path, cache: str) -> dict[str, Any]:
    """A cache's records: their keys are a promise of the format."""
    lines = topkd(here, "cache", "ls", cache, "--limit", "1000000", "--json").splitlines()
    records = [json.loads(line) for line in lines]
    scores = [record for record in records if record["kind"] == "score"]
    return {
        "records": len(records),
        "scores": len(scores),
        "keys": digest("".join(sorted(record["key"] for record in scores)).encode()),
    }


def run_of(folder: Path) -> dict[str, Any]:
    """A run folder's log by kind and step, the student's weights, and the rollouts it kept token by token."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [without(json.loads(line)) for line in lines]
    events = [record for record in records if record["kind"] == "event"]
    tokens = [without(json.loads(line)) for line in (folder / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in tokens:
        record.pop("divergence", None)  # a sentence
    return {
        "order": [f"{record['kind']} {record.get('step', record.get('event'))}" for record in records],
        "events": [event for event in events if event["event"] != "alarm"],
        "alarms": [event for event in events if event["event"] == "alarm"],
        "evals": {str(record["step"]): record for record in records if record["kind"] == "eval"},
        "steps": {str(record["step"]): record for record in records if record["kind"] == "step"},
        "weights": weights(folder / "student" / "model.safetensors"),
        "tokens_file": {"records": len(tokens), "sha256": digest(canonical(tokens).encode())},
    }


def without(value: Any) -> Any:
    """A record or report without seconds, traffic and provenance, at any depth."""
    if isinstance(value, dict):
        return {key: without(entry) for key, entry in value.items() if not key.endswith("_s") and key not in DROPPED}
    return [without(entry) for entry in value] if isinstance(value, list) else value


def machine() -> dict[str, Any]:
    """What decides the last digits."""
    import torch

    names = re.findall(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), flags=re.MULTILINE)
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def weights(path: Path) -> str:
    """Digest of the tensors of a safetensors file: names, shapes, types and bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return digest(json.dumps(header, sort_keys=True).encode() + data[8 + size :])


def digest(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def topkd(folder: Path, *words: str) -> str:
    """Standard output of a topkd command run in a folder; its whole output is shown where it fails."""
    command = [sys.executable, "-m", "topkd", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"topkd {' '.join(words)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def canonical(value: Any) -> str:
    """One text for one value: sorted keys, every float with all its digits."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text and empty container with its path."""
    if isinstance(value, dict) and value:
        for key in sorted(value, key=lambda name: (len(name), name) if name.isdigit() else (0, name)):
            yield from leaves(value[key], f"{path}.{key}")
    elif isinstance(value, list) and value:
        for number, entry in enumerate(value):
            yield from leaves(entry, f"{path}[{number}]")
    else:
        yield path, value


def differences(golden: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """One line a value that differs, in the order of the runs.

    On the same machine: every value, exactly. On another: keys everywhere, and the values of start events, the first
    evaluation, the first step and the score reports, where a float may differ by ``FIRST_STEP_TOLERANCE``. With another
    Python the models are trained on other texts (its library's sources), and only keys are compared.
    """
    same = golden["machine"] == found["machine"]
    same_texts = golden["machine"]["python"] == found["machine"]["python"]
    lines = []
    for part in ("models", "demo", "train", "replay", "score"):
        old, new = dict(leaves(golden[part], f".{part}")), dict(leaves(found[part], f".{part}"))
        for path in {**old, **new}:
            if not same and CHAOTIC.search(path):
                continue
            if path not in new:
                lines.append(f"{path[1:]}: expected {old[path]!r}, is gone")
            elif path not in old:
                lines.append(f"{path[1:]}: new, got {new[path]!r}")
            elif same:
                if not _equal(old[path], new[path]):
                    lines.append(f"{path[1:]}: expected {old[path]!r}, got {new[path]!r}{_apart(old[path], new[path])}")
            elif same_texts and part != "models" and not ROUNDED.search(path) and not _close(old[path], new[path]):
                lines.append(f"{path[1:]}: expected about {old[path]!r}, got {new[path]!r}")
    return lines


def _equal(old: Any, new: Any) -> bool:
    return type(old) is type(new) and old == new


def _close(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, int | float):
        return math.isclose(old, new, rel_tol=FIRST_STEP_TOLERANCE, abs_tol=FIRST_STEP_TOLERANCE)
    return _equal(old, new)


def _apart(old: Any, new: Any) -> str:
    return f" (by {new - old:.3g})" if isinstance(old, float) and isinstance(new, float) else ""


if __name__ == "__main__":
    sys.exit(main())
