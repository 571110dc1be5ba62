"""Self-distillation with hints (OPSD): the teacher is the student as it was, told the answer; the student is not.

The student does not know what follows a letter. Told "it is l", it can repeat it. Its own told distribution, at the
tokens that it wrote untold, is the teacher: no other model, no server.

    python examples/self_distillation_hints.py
"""

import asyncio

from made_here import folder_of, rows, student, told

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train


def main() -> None:
    """Train, and print the accuracy without hints."""
    here = folder_of(__file__)
    data = rows(here / "letters.jsonl")
    config = RunConfig.model_validate(
        {
            "steps": 50,
            "student": {"model": str(student(here / "student"))},
            "teacher": {"kind": "self", "ema": 1.0},  # frozen: what it knew when told stays what it teaches
            "data": {"path": str(data), "privileged": {"hint": "{hint}"}},
            "rollout": {"prompts_per_step": 52, "samples_per_prompt": 1, "max_completion_tokens": 3},
            "learner": {"lr": 2e-3, "warmup_steps": 5},
            "eval": {"path": str(data), "every": 25, "max_tokens": 3, "scorer": "exact_match", "prefixes": ["fixed"]},
        }
    )
    asyncio.run(train(config, here / "run"))
    told(here / "run")


if __name__ == "__main__":
    main()
