"""A remote teacher and a local student: the learner reaches the teacher over HTTP only.

The example starts the embedded server. To use a vLLM, put its address in ``url``. ``eval.teacher`` also loads the
teacher's weights here, only to measure exact divergences; leave it out if you do not have them.

    python examples/remote_teacher.py
"""

import asyncio

from letter_task import make_output_folder, print_evaluations, train_student, train_teacher, write_rows

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.serve import ServeConfig, ServerProcess


def main() -> None:
    """Serve a teacher, train from it, and print divergence and accuracy."""
    here = make_output_folder(__file__)
    data = write_rows(here / "letters.jsonl", hint=None)
    teacher = train_teacher(here / "teacher")
    with ServerProcess(ServeConfig(model=str(teacher), served_model_name="teacher", port=0)) as server:
        config = RunConfig.model_validate(
            {
                "steps": 40,
                "student": {"model": str(train_student(here / "student"))},
                "teacher": {"url": server.url},
                "data": {"path": str(data)},
                "cache": {"path": str(here / "cache")},  # no sequence is scored twice; `topkd replay` needs no server
                "rollout": {"prompts_per_step": 52, "samples_per_prompt": 1, "max_completion_tokens": 3},
                "learner": {"lr": 2e-3, "warmup_steps": 5},
                "eval": {
                    "path": str(data),
                    "every": 20,
                    "max_tokens": 3,
                    "scorer": "exact_match",
                    "teacher": str(teacher),
                    "best": "accuracy",
                },
            }
        )
        asyncio.run(train(config, here / "run"))
    print_evaluations(here / "run")


if __name__ == "__main__":
    main()
