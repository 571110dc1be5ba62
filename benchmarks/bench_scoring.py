"""Scoring on a loopback server with canned replies, 64 in flight: topkd, openai-python, TRL's client.

One process serves, and each side runs in a process of its own, in turns. A side scores the same prompts over the same
route and ends with the same arrays (ids and logprobs by rank, the realised token's logprob).

* F4: tokens per second, and CPU seconds per million tokens of the client's process, warm.
* CPU seconds for sequences of 128, 512 and 2,048 tokens: of a whole process (interpreter, imports, requests), of its
  first requests once everything is imported (cold), and of as many more (warm). Also of ``topkd score`` as a process.

A side whose package is not installed is left out and said to be. The peers live in .venv-bench (made by ``make
bench-clients``: scripts/setup_bench.sh), or in the interpreters that are named:

    python benchmarks/bench_scoring.py [--openai-python PATH] [--trl-python PATH] [--only tokens|lengths] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

RESULTS = Path(__file__).parent / "results" / "bench_scoring.json"
BENCH_PYTHON = str(Path(__file__).parents[1] / ".venv-bench" / "bin" / "python")
IN_FLIGHT = 64
REQUESTS = {20: 192, 128: 64}
ENV = dict(os.environ)
LENGTHS = {128: 50, 512: 10, 2048: 3}
DISTINCT = 100  # prompts that ``topkd score`` scores; it sends none twice
Run: TypeAlias = Callable[[int], Awaitable[None]]
Side: TypeAlias = Callable[[str, list[int], int], contextlib.AbstractAsyncContextManager[Run]]


def to_arrays(rows: list, ids: list[int], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The loop a user writes over ``prompt_logprobs``."""
    all_ids, all_logp, actual = [], [], []
    for token, row in zip(ids[1:], rows[1:], strict=True):
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


async def serve(positions: int, distinct: int) -> None:
    """Answers every scoring request with the canned reply of its K, or of its prompt."""
    from replies import score_reply

    replies, by_prompt = dict[int, bytes](), dict[int, bytes]()
    for seed in range(distinct if distinct > 1 else 0):
        body, ids = score_reply(positions, 20, seed=seed)
        by_prompt[int(ids[0])] = body

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1])) if length else b""
                k = re.search(rb'"prompt_logprobs":\s*(\d+)', body)
                if k is None:
                    out = b'{"object":"list","data":[{"id":"t","max_model_len":8192}]}'
                elif by_prompt:
                    out = by_prompt[int(re.search(rb'"prompt":\s*\[\s*(\d+)', body)[1])]  # type: ignore[index]
                elif (width := int(k[1])) in replies:
                    out = replies[width]
                else:
                    out = replies[width] = score_reply(positions, width)[0]
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(out)
                )
                writer.write(out)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.asynccontextmanager
async def topkd_side(url: str, ids: list[int], k: int) -> AsyncIterator[Run]:
    from topkd.clients import ClientConfig, VllmCompletions

    config = ClientConfig(max_in_flight=IN_FLIGHT, window_start=IN_FLIGHT, budget_token_k=10**8)
    async with VllmCompletions(url, model="t", config=config) as client:
        gate = asyncio.Semaphore(IN_FLIGHT)

        async def one() -> None:
            async with gate:
                assert (await client.score(ids, 0, k)).rows == len(ids) - 1

        async def run(count: int) -> None:
            await asyncio.gather(*(one() for _ in range(count)))

        yield run


@contextlib.asynccontextmanager
async def openai_side(url: str, ids: list[int], k: int) -> AsyncIterator[Run]:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        gate = asyncio.Semaphore(IN_FLIGHT)

        async def one() -> None:
            async with gate:
                reply = await client.completions.create(
                    model="t", prompt=ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": k}
                )
                arrays = to_arrays(reply.choices[0].prompt_logprobs, ids, k)  # type: ignore[attr-defined]
                assert arrays[0].shape == (len(ids) - 1, k)

        async def run(count: int) -> None:
            await asyncio.gather(*(one() for _ in range(count)))

        yield run


@contextlib.asynccontextmanager
async def trl_side(url: str, ids: list[int], k: int) -> AsyncIterator[Run]:
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient.__new__(VLLMClient)  # its constructor waits for routes that only a server in training mode has
    setup_trl(client, url)

    async def run(count: int) -> None:
        for first in range(0, count, IN_FLIGHT):
            part = min(IN_FLIGHT, count - first)
            reply = client.get_sequence_logprobs(
                [ids] * part, [1] * part, top_logprobs=k, chunk_size=1, max_concurrent_requests=IN_FLIGHT
            )
            arrays = np.array(reply["logprob_token_ids"], np.int32), np.array(reply["logprobs"], np.float32)
            assert arrays[0].shape == (part, len(ids) - 1, k)

    yield run


def setup_trl(client: object, url: str) -> None:
    """What its constructor does: one session whose pool takes all connections."""
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    session.mount("http://", HTTPAdapter(pool_maxsize=IN_FLIGHT))
    client.__dict__.update(base_url=url, model="t", session=session)


SIDES: dict[str, tuple[str, Side]] = {
    "topkd": ("topkd.clients.dialects.vllm", topkd_side),
    "openai": ("openai", openai_side),
    "trl": ("trl.generation.vllm_client", trl_side),
}


async def run_side(side: str, url: str, positions: int, k: int, n: int) -> None:
    """In a process of its own: prints its seconds of wall and CPU time.

    ``process_s`` is all of its CPU time to the end of the first ``n`` requests, interpreter and imports included;
    ``cold_s`` is that without imports. Then come ``n`` more, warm.
    """
    from replies import prompt_ids

    ids = prompt_ids(positions)
    module, opened = SIDES[side]
    importlib.import_module(module)
    imported = time.process_time()
    async with opened(url, ids, k) as run:
        await run(n)
        first = time.process_time()
        wall = time.perf_counter()
        await run(n)
        wall, warm = time.perf_counter() - wall, time.process_time() - first
    out = {"wall_s": wall, "warm_s": warm, "cold_s": first - imported, "process_s": first, "tokens": positions * n}
    print(json.dumps(out))


def available(python: str, side: str) -> bool:
    done = subprocess.run([python, "-c", f"import {SIDES[side][0]}"], capture_output=True, check=False)
    return done.returncode == 0


@contextlib.contextmanager
def server(positions: int, distinct: int = 1) -> Iterator[str]:
    """A server in a process of its own: its CPU time is nobody's."""
    command = [sys.executable, __file__, "--serve", "--positions", str(positions), "--distinct", str(distinct)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"  # type: ignore[union-attr]
    finally:
        process.kill()
        process.wait()


def measure(python: str, side: str, url: str, positions: int, k: int, n: int) -> dict[str, float]:
    command = [python, __file__, "--side", side, "--url", url, "--k", str(k), "--requests", str(n)]
    command += ["--positions", str(positions)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=ENV).stdout))


def compare(pythons: dict[str, str], positions: int, rounds: int) -> dict[str, Any]:
    """F4: tokens per second and CPU time per token of a warm process, at its best round."""
    rows, missed = [], []
    with server(positions) as url:
        print(f"{'K':>4} {'client':<8} {'ktok/s':>9} {'CPU s/Mtok':>11}  topkd is")
        for k, n in REQUESTS.items():
            best = {side: {"wall": 0.0, "cpu": float("inf")} for side in pythons}
            for _ in range(rounds):
                for side, python in pythons.items():
                    out = measure(python, side, url, positions, k, n)
                    best[side]["wall"] = max(best[side]["wall"], out["tokens"] / out["wall_s"])
                    best[side]["cpu"] = min(best[side]["cpu"], out["warm_s"] / out["tokens"] * 1e6)
            for side in pythons:
                faster = best["topkd"]["wall"] / best[side]["wall"]
                cheaper = best[side]["cpu"] / best["topkd"]["cpu"]
                rows.append(
                    {"k": k, "client": side, "tokens_per_s": best[side]["wall"], "cpu_s_per_mtok": best[side]["cpu"]}
                )
                print(
                    f"{k:>4} {side:<8} {best[side]['wall'] / 1e3:>9.1f} {best[side]['cpu']:>11.2f}"
                    f"  {faster:.1f}x as fast, 1/{cheaper:.1f} of the CPU"
                )
                if side != "topkd" and min(faster, cheaper) < 3.0:
                    missed.append(f"K={k} against {side}: {faster:.1f}x, 1/{cheaper:.1f}")
    return {"positions": positions, "in_flight": IN_FLIGHT, "requests": REQUESTS, "rows": rows, "missed": missed}


def compare_lengths(pythons: dict[str, str], rounds: int) -> dict[str, Any]:
    """CPU seconds for sequences of each length at K = 20: medians, and medians of the ratios within a round."""
    rows, missed = [], []
    for side, python in pythons.items():  # once unmeasured: from here on every module has its bytecode
        with server(128) as url:
            measure(python, side, url, 128, 20, 2)
    print(f"{'tokens':>6} {'client':<8} {'process':>8} {'cold':>7} {'warm':>7}  topkd / client: process, cold, warm")
    for length, n in LENGTHS.items():
        outs: dict[str, list[dict[str, float]]] = {side: [] for side in pythons}
        with server(length) as url:
            for _ in range(rounds):
                for side, python in pythons.items():
                    outs[side].append(measure(python, side, url, length, 20, n))
        for side in pythons:
            row: dict[str, Any] = {"tokens": length, "client": side, "requests": n}
            for what in ("process_s", "cold_s", "warm_s"):
                row[what] = statistics.median(out[what] for out in outs[side])
                pairs = zip(outs["topkd"], outs[side], strict=True)
                row[f"ratio_{what}"] = statistics.median(ours[what] / other[what] for ours, other in pairs)
            rows.append(row)
            ratios = [row[f"ratio_{what}"] for what in ("process_s", "cold_s", "warm_s")]
            print(
                f"{length:>6} {side:<8} {row['process_s']:>8.2f} {row['cold_s']:>7.3f} {row['warm_s']:>7.3f}  "
                + ", ".join(f"{ratio:.2f}" for ratio in ratios),
                flush=True,
            )
            if side != "topkd" and (max(ratios[:2]) > 1.0 or ratios[2] > 0.5):
                missed.append(f"{length} tokens against {side}: process, cold and warm {[round(r, 2) for r in ratios]}")
    return {"rounds": rounds, "rows": rows, "missed": missed}


def time_score_command(rounds: int) -> dict[str, Any]:
    """CPU seconds of ``topkd score`` as a process, over 100 sequences of 128 tokens at K = 20."""
    from replies import prompt_ids

    took = []
    with tempfile.TemporaryDirectory() as folder, server(128, DISTINCT) as url:
        prompts = [prompt_ids(128, seed=seed) for seed in range(DISTINCT)]
        rows = [json.dumps({"prompt_ids": ids[:1], "completion_ids": ids[1:]}) + "\n" for ids in prompts]
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(rows))
        for number in range(rounds + 1):
            command = [sys.executable, "-m", "topkd", "score", str(data), "--teacher", url, "--dialect", "vllm"]
            command += ["--model", "t", "--out", f"{folder}/cache-{number}", "--k", "20"]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, capture_output=True, env=ENV)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    result = {"process_s": statistics.median(took[1:]), "requests": DISTINCT, "tokens": 128}
    print(f"topkd score, 100 sequences of 128 tokens: {result['process_s']:.2f} CPU s, the whole process")
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("tokens", "lengths"))
    other = BENCH_PYTHON if Path(BENCH_PYTHON).exists() else sys.executable
    parser.add_argument("--openai-python", default=other)
    parser.add_argument("--trl-python", default=other)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--distinct", type=int, default=1)
    parser.add_argument("--side")
    parser.add_argument("--url")
    parser.add_argument("--k", type=int)
    parser.add_argument("--requests", type=int)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.positions, options.distinct))
        return
    if options.side:
        asyncio.run(run_side(options.side, options.url, options.positions, options.k, options.requests))
        return
    from replies import machine

    named = {"topkd": sys.executable, "openai": options.openai_python, "trl": options.trl_python}
    pythons = {side: python for side, python in named.items() if available(python, side)}
    for side in set(named) - set(pythons):
        print(f"not measured: {side} (not importable by {named[side]})")
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    result["machine"] = machine()
    about = {"machine": machine(), "not_measured": sorted(set(named) - set(pythons))}
    ENV.pop("PYTHONDONTWRITEBYTECODE", None)  # in use, a module has its bytecode
    if options.only != "lengths":
        result["tokens"] = about | compare(pythons, options.positions, options.rounds)
    if options.only != "tokens":
        result["lengths"] = about | compare_lengths(pythons, options.rounds)
        result["lengths"]["score_command"] = time_score_command(options.rounds)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    missed = [line for name in ("tokens", "lengths") for line in result.get(name, {"missed": []})["missed"]]
    print("missed: " + "; ".join(missed) if missed else "every target is met")


if __name__ == "__main__":
    main()
