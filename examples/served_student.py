"""Sample the student from a server that receives a new LoRA adapter after each step, and show each step's version.

The example starts the embedded server. To use a vLLM that serves the student's model, pass its address:

    python examples/served_student.py
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve runs/examples/served_student/student --enable-lora --enable-scale-out
    python examples/served_student.py runs/examples/served_student http://127.0.0.1:8000

How to start such a server, and what is checked: docs/how-to/served-student.md.
"""

import asyncio
import contextlib
import shutil
import sys

from letter_task import make_output_folder, print_evaluations, train_student, train_teacher, write_rows

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.engine.loop.metrics import read_metrics
from topkd.serve import ServeConfig, ServerProcess


def main() -> None:
    """Train an adapter, sample from a server, and print the accuracy and the weight version of each step."""
    here = make_output_folder(__file__)
    data = write_rows(here / "letters.jsonl", hint=None)
    teacher = train_teacher(here / "teacher")
    base = here / "student"
    if not base.exists():  # a server may be serving it
        train_student(base)
    with contextlib.ExitStack() as stack:
        if len(sys.argv) > 2:
            url = sys.argv[2]
        else:
            url = stack.enter_context(ServerProcess(ServeConfig(model=str(base), port=0))).url
        config = RunConfig.model_validate(
            {
                "steps": 30,
                "student": {"model": str(base), "lora": {"r": 16, "alpha": 32.0}},
                "teacher": {"kind": "local", "model": str(teacher)},
                "data": {"path": str(data)},
                "sampler": {"kind": "server", "url": url},
                "rollout": {"prompts_per_step": 52, "samples_per_prompt": 1, "max_completion_tokens": 3},
                "learner": {"lr": 1e-2, "warmup_steps": 5},
                "eval": {
                    "path": str(data),
                    "every": 15,
                    "max_tokens": 3,
                    "scorer": "exact_match",
                    "prefixes": ["fixed"],
                },
            }
        )
        shutil.rmtree(here / "run", ignore_errors=True)
        asyncio.run(train(config, here / "run"))
    print_evaluations(here / "run")
    steps = read_metrics(here / "run" / "metrics.jsonl", "step")
    for step in steps[-3:]:
        learnt, pushed = ", ".join(step["rollout_versions"]), step["sampler_version"]
        size, kl = step["sync_bytes"] / 1024, step["sync_kl"]
        print(f"step {step['step']}: from version {learnt}; {pushed} pushed, {size:.0f} kB, {kl:.0e} nats off")


if __name__ == "__main__":
    main()
