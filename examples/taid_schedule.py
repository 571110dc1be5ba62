"""TAID (arXiv:2501.16937): the target moves from the student to the teacher while training.

The target is a mixture of student and teacher. The teacher's weight t grows from 0.4 to 1 over the run's steps, faster
while the loss falls. The weight of every step is in the run log (``taid_t``).

    python examples/taid_schedule.py
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
            "objective": {"kind": "taid", "t_start": 0.4, "t_end": 1.0, "alpha": 5e-4},
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
