"""F4: scoring end to end on a loopback server with canned replies, 64 in flight: topkd, openai-python, TRL's client.

One process serves, and each side runs in a process of its own, in turns. A side scores the same prompts over the same
route and ends with the same arrays (ids and logprobs by rank, the realised token's logprob); what counts is tokens per
second of wall time and CPU seconds per million tokens of the client's process. A side whose package is not installed is
left out and said to be. The peers live in .venv-bench (made by ``make bench-clients``: scripts/setup_bench.sh), or in
the interpreters that are named:

    python benchmarks/bench_scoring.py [--openai-python PATH] [--trl-python PATH] [--positions 1024] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "bench_scoring.json"
BENCH_PYTHON = str(Path(__file__).parents[1] / ".venv-bench" / "bin" / "python")
IN_FLIGHT = 64
REQUESTS = {20: 192, 128: 64}
SIDES = ("topkd", "openai", "trl")


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


async def serve(positions: int) -> None:
    """Answers every scoring request with the canned reply of its K."""
    from replies import score_reply

    replies = {k: score_reply(positions, k)[0] for k in REQUESTS}

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1])) if length else b""
                k = re.search(rb'"prompt_logprobs":\s*(\d+)', body)
                out = replies[int(k[1])] if k else b'{"object":"list","data":[{"id":"t","max_model_len":8192}]}'
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


def start() -> tuple[float, float]:
    """Wall and CPU clock, after the imports and one warm-up request."""
    return time.perf_counter(), time.process_time()


def stop(begun: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


async def side_topkd(url: str, ids: list[int], k: int, n: int) -> tuple[float, float]:
    from topkd.clients import ClientConfig, VllmCompletions

    config = ClientConfig(max_in_flight=IN_FLIGHT, window_start=IN_FLIGHT, budget_token_k=10**8)
    async with VllmCompletions(url, model="t", config=config) as client:
        await client.score(ids, 0, k)
        begun = start()
        gate = asyncio.Semaphore(IN_FLIGHT)

        async def score() -> None:
            async with gate:
                assert (await client.score(ids, 0, k)).rows == len(ids) - 1

        await asyncio.gather(*(score() for _ in range(n)))
        return stop(begun)


async def side_openai(url: str, ids: list[int], k: int, n: int) -> tuple[float, float]:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def one() -> None:
        async with gate:
            reply = await client.completions.create(
                model="t", prompt=ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": k}
            )
            arrays = to_arrays(reply.choices[0].prompt_logprobs, ids, k)  # type: ignore[attr-defined]
            assert arrays[0].shape == (len(ids) - 1, k)

    await one()
    begun = start()
    await asyncio.gather(*(one() for _ in range(n)))
    took = stop(begun)
    await client.close()
    return took


async def side_trl(url: str, ids: list[int], k: int, n: int) -> tuple[float, float]:
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient.__new__(VLLMClient)  # its constructor waits for routes that only a server in training mode has
    setup_trl(client, url)

    def run(count: int) -> None:
        reply = client.get_sequence_logprobs(
            [ids] * count, [1] * count, top_logprobs=k, chunk_size=1, max_concurrent_requests=IN_FLIGHT
        )
        arrays = np.array(reply["logprob_token_ids"], np.int32), np.array(reply["logprobs"], np.float32)
        assert arrays[0].shape == (count, len(ids) - 1, k)

    run(1)
    begun = start()
    for first in range(0, n, IN_FLIGHT):
        run(min(IN_FLIGHT, n - first))
    return stop(begun)


def setup_trl(client: object, url: str) -> None:
    """What its constructor does: one session whose pool takes all connections."""
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    session.mount("http://", HTTPAdapter(pool_maxsize=IN_FLIGHT))
    client.__dict__.update(base_url=url, model="t", session=session)


def run_side(side: str, url: str, positions: int, k: int) -> None:
    """In a process of its own: prints seconds of wall and CPU time."""
    from replies import prompt_ids

    ids = prompt_ids(positions)
    n = REQUESTS[k]
    run = {"topkd": side_topkd, "openai": side_openai, "trl": side_trl}[side]
    wall, cpu = asyncio.run(run(url, ids, k, n))
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "tokens": positions * n}))


def available(python: str, side: str) -> bool:
    module = {"topkd": "topkd.clients.dialects.vllm", "openai": "openai", "trl": "trl.generation.vllm_client"}[side]
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def compare(options: argparse.Namespace) -> None:
    from replies import machine

    pythons = {"topkd": sys.executable, "openai": options.openai_python, "trl": options.trl_python}
    sides = [side for side in SIDES if available(pythons[side], side)]
    for side in set(SIDES) - set(sides):
        print(f"not measured: {side} (not importable by {pythons[side]})")
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", "--positions", str(options.positions)], stdout=subprocess.PIPE, text=True
    )
    rows = []
    missed = []
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"  # type: ignore[union-attr]
        print(f"{'K':>4} {'client':<8} {'ktok/s':>9} {'CPU s/Mtok':>11}  topkd is")
        for k in REQUESTS:
            best = {side: {"wall": 0.0, "cpu": float("inf")} for side in sides}
            for _ in range(options.rounds):
                for side in sides:
                    command = [pythons[side], __file__, "--side", side, "--url", url, "--k", str(k)]
                    command += ["--positions", str(options.positions)]
                    out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                    best[side]["wall"] = max(best[side]["wall"], out["tokens"] / out["wall_s"])
                    best[side]["cpu"] = min(best[side]["cpu"], out["cpu_s"] / out["tokens"] * 1e6)
            for side in sides:
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
    finally:
        server.kill()
        server.wait()
    result = {
        "machine": machine(), "positions": options.positions, "in_flight": IN_FLIGHT, "requests": REQUESTS,
        "rows": rows,
        "not_measured": sorted(set(SIDES) - set(sides)), "missed": missed,
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print("missed: " + "; ".join(missed) if missed else "every target of F4 is met")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    other = BENCH_PYTHON if Path(BENCH_PYTHON).exists() else sys.executable
    parser.add_argument("--openai-python", default=other)
    parser.add_argument("--trl-python", default=other)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--side")
    parser.add_argument("--url")
    parser.add_argument("--k", type=int)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.positions))
    elif options.side:
        run_side(options.side, options.url, options.positions, options.k)
    else:
        compare(options)


if __name__ == "__main__":
    main()
