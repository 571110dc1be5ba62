"""Sample the student from a server, with the LoRA adapter of each step.

The server has the base model. After each step the learner writes its adapter, the server loads it under the step's
version, and every completion is checked to be of that version. The example starts the embedded server. To use a vLLM,
start it with ``--enable-lora`` (and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1) and put its address in ``url``.

    python examples/lora_sync.py
"""

import asyncio

from letter_task import make_output_folder, print_evaluations, train_student, train_teacher, write_rows

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.serve import ServeConfig, ServerProcess


def main() -> None:
    """Train the adapter, and print divergence and accuracy."""
    here = make_output_folder(__file__)
    data = write_rows(here / "letters.jsonl", hint=None)
    base = train_student(here / "student")
    with ServerProcess(ServeConfig(model=str(base), served_model_name="student", port=0)) as server:
        config = RunConfig.model_validate(
            {
                "steps": 40,
                "student": {"model": str(base), "lora": {"r": 16, "alpha": 32.0}},
                "sampler": {"kind": "server", "url": server.url},
                "teacher": {"kind": "local", "model": str(train_teacher(here / "teacher"))},
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
    print_evaluations(here / "run")


if __name__ == "__main__":
    main()
