"""Runs inside the vLLM venv: VllmInProcess as a user would drive it; prints what came back as JSON.

Usage: python inprocess_program.py ROOT MODEL UPDATED REQUEST.json
"""

from __future__ import annotations

import asyncio
import json
import sys


async def main(root: str, folder: str, updated: str, request_path: str) -> dict[str, object]:
    sys.path.insert(0, root)
    import numpy as np

    from topkd.clients.dialects.vllm_inprocess import VllmInProcess
    from topkd.topk.errors import TopkdError
    from topkd.topk.protocols import WeightUpdate
    from topkd.topk.samples import SamplingParams

    with open(request_path) as file:  # noqa: PTH123 - kept plain: this file runs outside the project's venv
        request = json.load(file)
    prompts, k = request["prompts"], request["k"]
    reply: dict[str, object] = {"httpx": "httpx" in sys.modules or "tenacity" in sys.modules}

    def table(rows):
        return {
            "start": rows.start,
            "ids": rows.ids.tolist(),
            "logp": rows.logp.astype(float).tolist(),
            "actual": rows.actual_logp.astype(float).tolist(),
        }

    async def error(call) -> str:
        try:
            await call
        except TopkdError as caught:
            return type(caught).__name__
        return "none"

    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_logprobs": 32}
    async with VllmInProcess(folder, vocab_size=2048, disable_log_stats=True, **engine) as up:
        # One of the waiting requests is refused; the others must not notice.
        scores, refused = await asyncio.gather(
            asyncio.gather(*(up.score(ids, len(ids) // 2, k) for ids in prompts)),
            error(up.score(prompts[0], 0, 33)),
        )
        reply["scores"], reply["k_above"] = [table(rows) for rows in scores], refused
        reply["too_long"] = await error(up.score(list(range(8, 308)), 0, 1))
        drawn = await up.sample(prompts[0], 2, SamplingParams(8, seed=7), k=k)
        reply["drawn"] = [
            {"ids": one.completion_ids.tolist(), "logp": one.logp.astype(float).tolist(), "topk": table(one.topk)}
            for one in drawn
        ]
        [hot] = await up.sample(prompts[0], 1, SamplingParams(3, temperature=0.5, seed=1))
        reply["hot_unknown"] = bool(np.isnan(hot.logp).all())
        candidates = np.array([[5, 9]] * (len(prompts[0]) - 1))
        reply["candidates"] = await error(up.score_candidates(prompts[0], 0, candidates))
        reply["version"] = await up.push(WeightUpdate("full", updated, "step-2"))
        reply["after"] = table(await up.score(prompts[0], len(prompts[0]) // 2, k))
        [late] = await up.sample(prompts[0], 1, SamplingParams(4, seed=7))
        reply["late"] = {"ids": late.completion_ids.tolist(), "logp": late.logp.astype(float).tolist()}
        reply["late_version"] = late.version
    return reply


if __name__ == "__main__":
    print("REPLY " + json.dumps(asyncio.run(main(*sys.argv[1:]))))
