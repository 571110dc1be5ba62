"""F2 and F3: a vLLM scoring reply to arrays, against the standard library's json and a loop, on the same bytes.

Every reading gives the same arrays: ids and logprobs [R, K] by rank and the realised token's logprob. The sides take
turns (A, B, C, A, ...) in one process, and each reports its fastest turn, so that a busy machine slows both alike.

    python benchmarks/bench_decode.py [--positions 2048] [--rounds 15]
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from replies import machine, score_reply

from topkd.clients import decode, decode_numba, decode_numpy
from topkd.clients.decode_binary import flat_lists, npy_matrix
from topkd.clients.decode_json import prompt_rows, scored_choice

RESULTS = Path(__file__).parent / "results" / "bench_decode.json"
TARGETS = {"numpy": {20: 7.0, 128: 5.0}, "numba": {20: 15.0, 128: 15.0}}


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
        decode.check_prompt(scored_choice(envelope).prompt_token_ids, ids)
        return rows.ids, rows.logp.astype(np.float32), rows.actual_logp.astype(np.float32)

    return run


def typed(body: bytes, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    topk, _ = decode.scored(prompt_rows(scored_choice(body), ids, 0), ids, 0, k)
    return topk.ids, topk.logp, topk.actual_logp


def checked(body: bytes, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the client does: the fastest reading there is, every check, and a TopK."""
    topk = decode.score_reply(body, ids=ids, start=0, k=k)[0]
    return topk.ids, topk.logp, topk.actual_logp


def trl_parse() -> Callable[[bytes, np.ndarray, int], object] | None:
    """TRL's own parse of the same reply, where it is installed: lists of lists, as it hands them on."""
    try:
        from trl.generation.vllm_client import VLLMClient
    except ImportError:
        return None

    def run(body: bytes, ids: np.ndarray, k: int) -> object:
        choice = json.loads(body)["choices"][0]
        return VLLMClient._format_sequence_logprobs(choice, ids.tolist(), 1, k)  # noqa: SLF001 - it is what is measured

    return run


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
        return flat_lists(reply.val, reply.idx, rows=rows, k=k)

    return {
        "npy": lambda: npy_matrix(one.decode(npy).prompt_token_id_logprobs, rows=rows, k=k),
        "flat base64": read_flat,
    }


def take_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, side in sides.items():
            begun = time.perf_counter()
            side()
            best[name] = min(best[name], time.perf_counter() - begun)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    result: dict[str, object] = {"machine": machine(), "positions": options.positions, "rows": []}
    missed = []
    print(f"{'K':>4} {'reading':<34} {'ms':>9} {'ktok/s':>9} {'ns/entry':>9} {'x json+loop':>12}")
    for k in (20, 128):
        body, ids = score_reply(options.positions, k)
        readings = {"json + loop": json_loop, "msgspec typed, checked": typed, "numpy": fast(decode_numpy.read_rows)}
        if decode_numba.available():
            readings["numba"] = fast(decode_numba.read_rows)
        readings["bytes to checked TopK (as the client)"] = checked
        expected = json_loop(body, ids, k)
        for name, reading in readings.items():
            for got, want in zip(reading(body, ids, k), expected, strict=True):
                assert np.array_equal(got, want), name
        sides: dict[str, Callable[[], object]] = {
            name: partial(reading, body, ids, k) for name, reading in readings.items()
        }
        trl = trl_parse()
        if trl:
            sides["TRL's client (json + its parse)"] = partial(trl, body, ids, k)
        sides |= binary_sides(expected[0], expected[1])
        seconds = take_turns(sides, options.rounds)
        for name, took in seconds.items():
            ratio = seconds["json + loop"] / took
            entries = options.positions * k
            row = {"k": k, "reading": name, "ms": took * 1e3, "bytes": len(body), "ratio": ratio}
            result["rows"].append(row)  # type: ignore[attr-defined]
            print(
                f"{k:>4} {name:<34} {took * 1e3:>9.2f} {options.positions / took / 1e3:>9.0f} "
                f"{took / entries * 1e9:>9.1f} {ratio:>12.1f}"
            )
            target = TARGETS.get(name, {}).get(k) or (50.0 if name in {"npy", "flat base64"} else 0.0)
            if ratio < target:
                missed.append(f"K={k} {name}: {ratio:.1f}x, target {target:.0f}x")
        if trl:
            against = seconds["TRL's client (json + its parse)"] / seconds["bytes to checked TopK (as the client)"]
            print(f"{k:>4} to a checked TopK in 1/{against:.1f} of the time of TRL's parse")
            if against < 4.0:
                missed.append(f"K={k}: {against:.1f}x TRL's parse, target 4x")
    result["missed"] = missed
    result["trl"] = trl_parse() is not None
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print("missed: " + "; ".join(missed) if missed else "every target of F2 and F3 is met")


if __name__ == "__main__":
    main()
