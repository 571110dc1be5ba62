"""Self-distillation with feedback (SDPO): the teacher is the student, told what was wrong with the attempt it scores.

A function of yours looks at each completion. What it says goes into the teacher's prompt, and the teacher scores that
same completion: tokens that lead astray lose probability, the ones it would have written gain. The teacher follows the
student slowly (an exponential average), so that it gets better with it.

    python examples/self_distillation_feedback.py
"""

import asyncio

from made_here import folder_of, rows, student, told

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train


def feedback(row: dict, completion: str) -> str | None:
    """What a checker (a compiler, a unit test, a reader) would say; None when there is nothing to say."""
    return None if completion == row["answer"] else f"it is {row['answer']}"


def main() -> None:
    """Train, and print the accuracy without feedback."""
    here = folder_of(__file__)
    data = rows(here / "letters.jsonl", hint=None)
    config = RunConfig.model_validate(
        {
            "steps": 50,
            "max_staleness": 0,  # a teacher that moves scores each step with the weights of that step
            "student": {"model": str(student(here / "student"))},
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
                "prefixes": [],  # the teacher here is the student itself: told nothing, they never differ
            },
        }
    )
    asyncio.run(train(config, here / "run"))
    told(here / "run")


if __name__ == "__main__":
    main()
