"""F2 and F3: a vLLM scoring reply to arrays, against the standard library's json and a loop, on the same bytes.

Every reading gives the same arrays: ids and logprobs [R, K] by rank and the realised token's logprob. "Arrays" stop
there; "checked TopK" is what the client returns, every check made. The sides take turns (A, B, C, A, ...), and each
reports the CPU time of its cheapest turn: none of them computes in a second thread.

    python benchmarks/bench_decode.py [--positions 2048] [--rounds 15] [--trl-python PATH]

TRL's parse of the same bytes runs in .venv-bench, which ``make bench-clients`` (scripts/setup_bench.sh) makes.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
from replies import machine, score_reply

from topkd.clients.decoding import vllm as decode
from topkd.clients.decoding import vllm_numba as decode_numba
from topkd.clients.decoding import vllm_numpy as decode_numpy
from topkd.clients.decoding.binary import read_flat_lists, read_npy_matrix
from topkd.clients.decoding.checks import build_scores
from topkd.clients.decoding.vllm import read_prompt_rows, read_scored_choice

RESULTS = Path(__file__).parent / "results" / "bench_decode.json"
BENCH_PYTHON = str(Path(__file__).parents[1] / ".venv-bench" / "bin" / "python")
TARGETS = {"numpy, checked TopK": {20: 5.0, 128: 5.0}, "numba, checked TopK": {20: 15.0, 128: 15.0}}


def json_loop(body: bytes, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What one writes first: json.loads and a loop over the entries, into lists, then arrays."""
    rows = json.loads(body)["choices"][0]["prompt_logprobs"]
    all_ids, all_logp, actual = [], [], []
    for token, row in zip(ids[1:].tolist(), rows[1:], strict=True):
        row_ids, row_logp = [-1] * k, [0.0] * k
        for key, entry in row.items():
            place = entry["rank"] - 1
            if place < k:
                row_ids[place] = int(key)
                row_logp[place] = entry["logprob"]
        all_ids.append(row_ids)
        all_logp.append(row_logp)
        actual.append(row[str(token)]["logprob"])
    return np.array(all_ids, np.int32), np.array(all_logp, np.float32), np.array(actual, np.float32)


def fast(read: Callable) -> Callable:
    def run(body: bytes, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, envelope = read(body, ids, 0, k)
        assert read_scored_choice(envelope).prompt_token_ids == ids.tolist()
        return rows.ids, rows.logp.astype(np.float32), rows.actual_logp.astype(np.float32)

    return run


def typed(body: bytes, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    topk, _ = build_scores(read_prompt_rows(read_scored_choice(body), ids, 0), ids, 0, k)
    return topk.ids, topk.logp, topk.actual_logp


def checked(read: Callable) -> Callable:
    """What the client does with this reading: every check, and a TopK."""

    def run(body: bytes, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with mock.patch.object(decode.FastReader, "read", lambda _, *asked: read(*asked)):
            topk = decode.read_vllm_scores(body, ids=ids, start=0, k=k)[0]
        return topk.ids, topk.logp, topk.actual_logp

    return run


class Trl:
    """TRL's own parse of the same reply (lists of lists, as it hands them on), in a process of the peers' environment.

    It takes its turns like the others: a line in, the seconds that the parse took out.
    """

    NAME = "TRL's client (json + its parse)"

    def __init__(self, python: str, body: bytes, ids: np.ndarray, k: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        Path(self._folder.name, "body").write_bytes(body)
        Path(self._folder.name, "ask.json").write_text(json.dumps({"ids": ids.tolist(), "k": k}))
        command = [python, str(Path(__file__).with_name("trl_parse.py")), self._folder.name]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.say("")

    def say(self, word: str) -> str:
        """Sends a line and reads one."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        if word:
            self._child.stdin.write(word + "\n")
            self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs TRL's parse died")
        return line

    def seconds(self) -> float:
        """One turn."""
        return float(self.say("go"))

    def close(self) -> None:
        """Ends the process."""
        self._child.kill()
        self._child.wait()
        self._folder.cleanup()


class Npy(msgspec.Struct):
    """The binary field, base64 in JSON, as ``/inference/v1/generate`` sends it."""

    prompt_token_id_logprobs: bytes


class Flat(msgspec.Struct):
    """Two flat buffers, base64 in JSON, as SGLang's ``/generate`` sends them."""

    val: bytes
    idx: bytes


def binary_sides(ids: np.ndarray, logp: np.ndarray) -> dict[str, Callable[[], object]]:
    rows, k = logp.shape
    out = io.BytesIO()
    np.save(out, logp)
    npy = json.dumps({"prompt_token_id_logprobs": base64.b64encode(out.getvalue()).decode()}).encode()
    flat = json.dumps(
        {"val": base64.b64encode(logp.tobytes()).decode(), "idx": base64.b64encode(ids.tobytes()).decode()}
    ).encode()
    one, two = msgspec.json.Decoder(Npy), msgspec.json.Decoder(Flat)

    def read_flat() -> object:
        reply = two.decode(flat)
        return read_flat_lists(reply.val, reply.idx, rows=rows, k=k)

    return {
        "npy": lambda: read_npy_matrix(one.decode(npy).prompt_token_id_logprobs, rows=rows, k=k),
        "flat base64": read_flat,
    }


def take_turns(sides: dict[str, Callable[[], object]], rounds: int, trl: Trl | None) -> dict[str, float]:
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        if trl:
            best[trl.NAME] = min(best.get(trl.NAME, float("inf")), trl.seconds())
        for name, side in sides.items():
            begun = time.process_time()
            side()
            best[name] = min(best[name], time.process_time() - begun)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--trl-python", default=BENCH_PYTHON if Path(BENCH_PYTHON).exists() else sys.executable)
    options = parser.parse_args()
    probe = [options.trl_python, "-c", "import trl.generation.vllm_client"]
    has_trl = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    if not has_trl:
        print(f"not measured: TRL (not importable by {options.trl_python}; make bench-clients installs it)")
    result: dict[str, object] = {"machine": machine(), "positions": options.positions, "rows": []}
    missed = []
    print(f"{'K':>4} {'reading':<34} {'CPU ms':>9} {'ktok/s':>9} {'ns/entry':>9} {'x json+loop':>12}")
    for k in (20, 128):
        body, ids = score_reply(options.positions, k)
        readings = {"json + loop": json_loop, "msgspec, checked TopK": typed}
        ways = {"numpy": decode_numpy.read_rows}
        if decode_numba.available():
            ways["numba"] = decode_numba.read_rows_compiled
        for way, read in ways.items():
            readings |= {f"{way}, arrays": fast(read), f"{way}, checked TopK": checked(read)}
        expected = json_loop(body, ids, k)
        for name, reading in readings.items():
            for got, want in zip(reading(body, ids, k), expected, strict=True):
                assert np.array_equal(got, want), name
        sides: dict[str, Callable[[], object]] = {
            name: partial(reading, body, ids, k) for name, reading in readings.items()
        }
        sides |= binary_sides(expected[0], expected[1])
        trl = Trl(options.trl_python, body, ids, k) if has_trl else None
        try:
            seconds = take_turns(sides, options.rounds, trl)
        finally:
            if trl:
                trl.close()
        for name, took in seconds.items():
            ratio = seconds["json + loop"] / took
            entries = options.positions * k
            row = {"k": k, "reading": name, "cpu_ms": took * 1e3, "bytes": len(body), "ratio": ratio}
            result["rows"].append(row)  # type: ignore[attr-defined]
            print(
                f"{k:>4} {name:<34} {took * 1e3:>9.2f} {options.positions / took / 1e3:>9.0f} "
                f"{took / entries * 1e9:>9.1f} {ratio:>12.1f}"
            )
            target = TARGETS.get(name, {}).get(k) or (50.0 if name in {"npy", "flat base64"} else 0.0)
            if ratio < target:
                missed.append(f"K={k} {name}: {ratio:.1f}x, target {target:.0f}x")
        if trl:
            against = seconds[trl.NAME] / seconds[f"{way}, checked TopK"]
            print(f"{k:>4} to a checked TopK in 1/{against:.1f} of the time of TRL's parse")
            if against < 4.0:
                missed.append(f"K={k}: {against:.1f}x TRL's parse, target 4x")
    result["missed"] = missed
    result["trl"] = has_trl
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print("missed: " + "; ".join(missed) if missed else "every target of F2 and F3 is met")


if __name__ == "__main__":
    main()
