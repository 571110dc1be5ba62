"""Self-distillation with hints (OPSD): the teacher is the untrained student with the answer in its prompt.

The student does not know the next letter. With the hint "it is l" in its prompt, it can repeat it. The teacher is the
same model with the hint; it scores what the student wrote without the hint. No other model, no server.

    python examples/self_distillation_hints.py
"""

import asyncio

from letter_task import make_output_folder, print_evaluations, train_student, write_rows

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train


def main() -> None:
    """Train, and print the accuracy without hints."""
    here = make_output_folder(__file__)
    data = write_rows(here / "letters.jsonl")
    config = RunConfig.model_validate(
        {
            "steps": 50,
            "student": {"model": str(train_student(here / "student"))},
            "teacher": {"kind": "self", "ema": 1.0},  # the teacher keeps the first weights
            "data": {"path": str(data), "privileged": {"hint": "{hint}"}},
            "rollout": {"prompts_per_step": 52, "samples_per_prompt": 1, "max_completion_tokens": 3},
            "learner": {"lr": 2e-3, "warmup_steps": 5},
            "eval": {"path": str(data), "every": 25, "max_tokens": 3, "scorer": "exact_match", "prefixes": ["fixed"]},
        }
    )
    asyncio.run(train(config, here / "run"))
    print_evaluations(here / "run")


if __name__ == "__main__":
    main()
