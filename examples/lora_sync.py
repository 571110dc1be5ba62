"""The student is sampled from a server, on the LoRA adapter of the step: train here, generate where generating is fast.

The server holds the base model. After each step the learner writes its adapter, the server loads it under the step's
version, and every sampled token is checked to be that version's. The embedded server stands in for a vLLM that was
started with ``--enable-lora`` (and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1); give ``url`` the address of yours.

    python examples/lora_sync.py
"""

import asyncio

from made_here import folder_of, rows, student, teacher, told

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.serve import ServeConfig, ServerProcess


def main() -> None:
    """Train the adapter, and print the divergence and the accuracy on the way."""
    here = folder_of(__file__)
    data = rows(here / "letters.jsonl", hint=None)
    base = student(here / "student")
    with ServerProcess(ServeConfig(model=str(base), served_model_name="student", port=0)) as server:
        config = RunConfig.model_validate(
            {
                "steps": 40,
                "student": {"model": str(base), "lora": {"r": 16, "alpha": 32.0}},
                "sampler": {"kind": "server", "url": server.url},
                "teacher": {"kind": "local", "model": str(teacher(here / "teacher"))},
                "data": {"path": str(data)},
                "rollout": {"prompts_per_step": 52, "samples_per_prompt": 1, "max_completion_tokens": 3},
                "learner": {"lr": 5e-3, "warmup_steps": 5},
                "eval": {
                    "path": str(data),
                    "every": 20,
                    "max_tokens": 3,
                    "scorer": "exact_match",
                    "prefixes": ["fixed"],
                },
            }
        )
        asyncio.run(train(config, here / "run"))
    told(here / "run")


if __name__ == "__main__":
    main()
