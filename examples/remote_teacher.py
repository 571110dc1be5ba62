"""A remote teacher and a local student: the teacher is reached over HTTP only, and never opened by the learner.

The embedded server stands in for any vLLM: give ``url`` the address of yours. ``eval.teacher`` opens the teacher's
weights here too, only to measure the exact divergence; leave it out where you do not have them.

    python examples/remote_teacher.py
"""

import asyncio

from made_here import folder_of, rows, student, teacher, told

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.serve import ServeConfig, ServerProcess


def main() -> None:
    """Serve a teacher, train against it, print how near the student came."""
    here = folder_of(__file__)
    data = rows(here / "letters.jsonl", hint=None)
    knows = teacher(here / "teacher")
    with ServerProcess(ServeConfig(model=str(knows), served_model_name="teacher", port=0)) as server:
        config = RunConfig.model_validate(
            {
                "steps": 40,
                "student": {"model": str(student(here / "student"))},
                "teacher": {"url": server.url},
                "data": {"path": str(data)},
                "cache": {"path": str(here / "cache")},  # every score is paid for once; `topkd replay` needs no server
                "rollout": {"prompts_per_step": 52, "samples_per_prompt": 1, "max_completion_tokens": 3},
                "learner": {"lr": 2e-3, "warmup_steps": 5},
                "eval": {
                    "path": str(data),
                    "every": 20,
                    "max_tokens": 3,
                    "scorer": "exact_match",
                    "teacher": str(knows),
                    "best": "accuracy",
                },
            }
        )
        asyncio.run(train(config, here / "run"))
    told(here / "run")


if __name__ == "__main__":
    main()
