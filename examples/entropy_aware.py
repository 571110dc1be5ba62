"""Entropy-aware distillation: forward KL where the teacher's entropy is high, reverse KL where it is low.

The weight of the forward KL at a token is the teacher's entropy divided by ``h_max``. Where several answers are good,
the student then covers all of them; where one is good, it takes that one. The entropy used is the lower bound that a
top-K list gives.

    python examples/entropy_aware.py
"""

import asyncio

from letter_task import make_output_folder, print_evaluations, train_student, train_teacher, write_rows

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train


def main() -> None:
    """Train, and print divergence and accuracy."""
    here = make_output_folder(__file__)
    data = write_rows(here / "letters.jsonl", hint=None)
    config = RunConfig.model_validate(
        {
            "steps": 40,
            "objective": {"kind": "entropy_aware", "h_max": 2.0},
            "student": {"model": str(train_student(here / "student"))},
            "teacher": {"kind": "local", "model": str(train_teacher(here / "teacher"))},
            "data": {"path": str(data)},
            "rollout": {"prompts_per_step": 52, "samples_per_prompt": 1, "max_completion_tokens": 3},
            "learner": {"lr": 2e-3, "warmup_steps": 5},
            "eval": {"path": str(data), "every": 20, "max_tokens": 3, "scorer": "exact_match", "prefixes": ["fixed"]},
        }
    )
    asyncio.run(train(config, here / "run"))
    print_evaluations(here / "run")


if __name__ == "__main__":
    main()
