"""Runs inside the vLLM venv: scores and samples with ``vllm.LLM`` in this process and prints what came back as JSON.

Usage: python inprocess_check.py MODEL_DIR REQUEST.json   (the request: {"prompts": [[ids]], "k": int})
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, request_path = sys.argv[1:]
    with open(request_path) as file:  # noqa: PTH123 - kept plain: this file runs outside the project's venv
        request = json.load(file)
    prompts, k = request["prompts"], request["k"]
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, max_logprobs=64, disable_log_stats=True)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]

    flat = llm.generate(
        inputs,
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=k, flat_logprobs=True, detokenize=False),
        use_tqdm=False,
    )
    nested = llm.generate(
        inputs, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=k, detokenize=False), use_tqdm=False
    )
    drawn = llm.generate(
        inputs,
        SamplingParams(max_tokens=8, temperature=1.0, seed=7, logprobs=k, flat_logprobs=True, ignore_eos=True),
        use_tqdm=False,
    )

    def table(logprobs: object) -> dict[str, object]:
        names = ("start_indices", "end_indices", "token_ids", "logprobs", "ranks", "decoded_tokens")
        return {"type": type(logprobs).__name__, "len": len(logprobs), **{n: list(getattr(logprobs, n)) for n in names}}

    reply = {
        "flat": [table(out.prompt_logprobs) for out in flat],
        "nested": [
            [row and [[i, e.logprob, e.rank] for i, e in row.items()] for row in out.prompt_logprobs] for out in nested
        ],
        "drawn": [
            {
                "token_ids": list(out.outputs[0].token_ids),
                "logprobs": table(out.outputs[0].logprobs),
                "finish_reason": out.outputs[0].finish_reason,
                "cumulative_logprob": out.outputs[0].cumulative_logprob,
            }
            for out in drawn
        ],
        "order": [out.prompt_token_ids for out in flat],
    }
    print("REPLY " + json.dumps(reply))


if __name__ == "__main__":
    main()
