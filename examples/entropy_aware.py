"""Entropy-aware distillation: forward KL where the teacher is unsure, reverse KL where it knows.

The weight of forward KL at a token is the teacher's entropy there over ``h_max``: where several answers are good the
student is to cover them, where one is it is to choose. A top-K list gives a lower bound of the entropy; that is used.

    python examples/entropy_aware.py
"""

import asyncio

from made_here import folder_of, rows, student, teacher, told

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train


def main() -> None:
    """Train, and print the divergence and the accuracy on the way."""
    here = folder_of(__file__)
    data = rows(here / "letters.jsonl", hint=None)
    config = RunConfig.model_validate(
        {
            "steps": 40,
            "objective": {"kind": "entropy_aware", "h_max": 2.0},
            "student": {"model": str(student(here / "student"))},
            "teacher": {"kind": "local", "model": str(teacher(here / "teacher"))},
            "data": {"path": str(data)},
            "rollout": {"prompts_per_step": 52, "samples_per_prompt": 1, "max_completion_tokens": 3},
            "learner": {"lr": 2e-3, "warmup_steps": 5},
            "eval": {"path": str(data), "every": 20, "max_tokens": 3, "scorer": "exact_match", "prefixes": ["fixed"]},
        }
    )
    asyncio.run(train(config, here / "run"))
    told(here / "run")


if __name__ == "__main__":
    main()
