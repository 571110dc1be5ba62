"""Several teachers, each for its own rows: a column of the data says who scores what.

One knows what follows a letter, one what comes before.

Here both live in this process (``kind = "local"``); a teacher behind a server has a ``url`` instead, and the two may be
mixed. A row that names no teacher, or one that is not there, is an error before the first step.

    python examples/multi_teacher.py
"""

import asyncio

from made_here import folder_of, rows, student, teacher, told

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train


def main() -> None:
    """Train one student on both teachers, and print its accuracy on both tasks together."""
    here = folder_of(__file__)
    data = rows(here / "rows.jsonl", "><", hint=None, task={">": "next", "<": "before"})
    config = RunConfig.model_validate(
        {
            "steps": 40,
            "student": {"model": str(student(here / "student", "><"))},
            "teachers": {
                "next": {"kind": "local", "model": str(teacher(here / "next", ">"))},
                "before": {"kind": "local", "model": str(teacher(here / "before", "<"))},
            },
            "data": {"path": str(data), "teacher_column": "task"},
            "rollout": {"prompts_per_step": 104, "samples_per_prompt": 1, "max_completion_tokens": 3},
            "learner": {"lr": 2e-3, "warmup_steps": 5},
            "eval": {"path": str(data), "every": 20, "max_tokens": 3, "scorer": "exact_match", "prefixes": ["fixed"]},
        }
    )
    asyncio.run(train(config, here / "run"))
    told(here / "run")


if __name__ == "__main__":
    main()
