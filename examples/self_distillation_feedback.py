"""Self-distillation with feedback (SDPO): the teacher is the student with feedback on the completion in its prompt.

A function of yours returns feedback on each completion. It is put into the teacher's prompt, and the teacher scores the
same completion: wrong tokens become less likely, better ones more likely. The teacher's weights follow the student's
slowly (an exponential average), so the teacher improves too.

    python examples/self_distillation_feedback.py
"""

import asyncio

from letter_task import make_output_folder, print_evaluations, train_student, write_rows

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train


def feedback(row: dict, completion: str) -> str | None:
    """Return what a checker (a compiler, a unit test) would print; None if the answer is right."""
    return None if completion == row["answer"] else f"it is {row['answer']}"


def main() -> None:
    """Train, and print the accuracy without feedback."""
    here = make_output_folder(__file__)
    data = write_rows(here / "letters.jsonl", hint=None)
    config = RunConfig.model_validate(
        {
            "steps": 50,
            "max_staleness": 0,  # the teacher's weights change, so it must score at the right step
            "student": {"model": str(train_student(here / "student"))},
            "teacher": {"kind": "self", "ema": 0.99},
            "data": {
                "path": str(data),
                "feedback": f"{__file__}:feedback",
                "privileged": {"feedback": "{feedback}\n{prompt}"},
            },
            "rollout": {"prompts_per_step": 52, "samples_per_prompt": 1, "max_completion_tokens": 3},
            "learner": {"lr": 1.5e-3, "warmup_steps": 5},
            "eval": {
                "path": str(data),
                "every": 25,
                "max_tokens": 3,
                "scorer": "exact_match",
                "ceiling": False,
                "prefixes": [],  # without feedback the teacher is the student: no divergence to measure
            },
        }
    )
    asyncio.run(train(config, here / "run"))
    print_evaluations(here / "run")


if __name__ == "__main__":
    main()
