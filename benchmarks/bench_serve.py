"""The embedded server against plain transformers: tokens per CPU second of the same work on the same tiny model.

Sides take turns. A turn of the plain side runs one padded batch through the model in this process: ``generate`` with
sampling, or one forward pass with its log-softmax, top K and realised logprobs. A turn of the server sends the same
prompts as requests of their own, all in flight together, and counts the CPU seconds of the server's process alone
(/proc, so Linux only). Both use one thread. Each figure is the median over the rounds.

    python benchmarks/bench_serve.py [--rounds 5] [--hidden 160] [--vocab 1024]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import numpy as np
import torch
from replies import machine

from topkd.compose.demo_assets import assets
from topkd.serve import ServeConfig, ServerProcess

RESULTS = Path(__file__).parent / "results" / "bench_serve.json"
IN_FLIGHT, PROMPT, DRAWN, SCORED, K = 32, 32, 96, 512, 20
TICKS = os.sysconf("SC_CLK_TCK")


def make_model(folder: Path, hidden: int, vocab: int) -> np.ndarray:
    """Save a random model and a tokenizer of its size; return the ids of some Python source."""
    texts = assets.read_texts(assets.list_library_files(600_000))
    assets.train_tokenizer(texts, vocab, folder)
    shape = assets.TinyModel(hidden=hidden, layers=3, heads=4, steps=0, vocab_size=vocab, context=1024)
    assets.save_model(assets.build_model(shape), folder)
    return assets.encode_texts(texts[:20], folder)


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def plain_generate(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Draw DRAWN tokens for every prompt."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        min_new_tokens=DRAWN, max_new_tokens=DRAWN, pad_token_id=0,
    )  # fmt: skip
    assert out.shape[1] == PROMPT + DRAWN


@torch.inference_mode()
def plain_score(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Return what a scorer returns: the top K of every position and the realised logprob."""
    logp = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    top = logp.topk(K, dim=-1)
    actual = logp.gather(-1, ids[:, 1:, None])
    assert len(top.values.numpy()) == len(top.indices.numpy()) == len(actual.numpy())


async def post_all(url: str, route: str, bodies: list[dict]) -> None:
    """Send every request at once and read every reply."""
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        for reply in await asyncio.gather(*(http.post(route, json=body) for body in bodies)):
            assert reply.status_code == 200, reply.text


def measure(rounds: int, plain: Callable[[], None], served: Callable[[], None], pid: int, tokens: int) -> dict:
    """Run both sides in turns; return tokens per CPU second of each, and the ratio of each round."""
    plain()
    served()  # warm
    speeds: dict[str, list[float]] = {"plain": [], "serve": []}
    for _ in range(rounds):
        begun = time.process_time()
        for _ in range(4):
            plain()
        speeds["plain"].append(4 * tokens / (time.process_time() - begun))
        begun = cpu_seconds(pid)
        for _ in range(4):
            served()
        speeds["serve"].append(4 * tokens / (cpu_seconds(pid) - begun))
    ratios = [mine / theirs for mine, theirs in zip(speeds["serve"], speeds["plain"], strict=True)]
    return {name: round(statistics.median(values)) for name, values in speeds.items()} | {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(value, 3) for value in ratios],
    }


def main() -> None:
    """Print and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--vocab", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        ids = make_model(folder, options.hidden, options.vocab)
        prompts = ids[: IN_FLIGHT * PROMPT].reshape(IN_FLIGHT, PROMPT).astype(np.int64)
        texts = ids[: IN_FLIGHT * SCORED].reshape(IN_FLIGHT, SCORED).astype(np.int64)
        draw = {"temperature": 1.0, "max_tokens": DRAWN, "ignore_eos": True, "return_token_ids": True}
        draws = [{"prompt": row.tolist(), "logprobs": 0, "seed": place, **draw} for place, row in enumerate(prompts)]
        score = {"max_tokens": 1, "prompt_logprobs": K, "temperature": 0.0}
        scores = [{"prompt": row.tolist(), **score} for row in texts]
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        config = ServeConfig(model=str(folder), port=0, max_model_len=1024)
        with ServerProcess(config) as server:
            kinds = {
                "generate": (lambda: plain_generate(model, torch.from_numpy(prompts)), draws, IN_FLIGHT * DRAWN),
                "score": (lambda: plain_score(model, torch.from_numpy(texts)), scores, IN_FLIGHT * SCORED),
            }
            rows = []
            for kind, (plain, bodies, tokens) in kinds.items():
                served = lambda bodies=bodies: asyncio.run(post_all(server.url, "/v1/completions", bodies))  # noqa: E731
                rows.append({"kind": kind, **measure(options.rounds, plain, served, server.pid, tokens)})
                print(rows[-1], flush=True)
    size = {"hidden": options.hidden, "layers": 3, "vocab": options.vocab, "in_flight": IN_FLIGHT, "k": K}
    size |= {"prompt": PROMPT, "drawn": DRAWN, "scored": SCORED}
    facts = {"machine": machine(), "torch": torch.__version__, "size": size, "tokens_per_cpu_second": rows}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
