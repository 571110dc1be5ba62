"""Several teachers, each for its own rows: a column of the data names the teacher of a row.

One teacher knows the next letter, the other the letter before. Both run in this process (``kind = "local"``). A teacher
on a server has a ``url`` instead, and the two kinds may be mixed. A row without a known teacher is an error before the
first step.

    python examples/multi_teacher.py
"""

import asyncio

from letter_task import make_output_folder, print_evaluations, train_student, train_teacher, write_rows

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train


def main() -> None:
    """Train one student on both teachers, and print its accuracy on both tasks together."""
    here = make_output_folder(__file__)
    data = write_rows(here / "rows.jsonl", "><", hint=None, task={">": "next", "<": "before"})
    config = RunConfig.model_validate(
        {
            "steps": 40,
            "student": {"model": str(train_student(here / "student", "><"))},
            "teachers": {
                "next": {"kind": "local", "model": str(train_teacher(here / "next", ">"))},
                "before": {"kind": "local", "model": str(train_teacher(here / "before", "<"))},
            },
            "data": {"path": str(data), "teacher_column": "task"},
            "rollout": {"prompts_per_step": 104, "samples_per_prompt": 1, "max_completion_tokens": 3},
            "learner": {"lr": 2e-3, "warmup_steps": 5},
            "eval": {"path": str(data), "every": 20, "max_tokens": 3, "scorer": "exact_match", "prefixes": ["fixed"]},
        }
    )
    asyncio.run(train(config, here / "run"))
    print_evaluations(here / "run")


if __name__ == "__main__":
    main()
