"""An objective of your own in twenty lines: a function from the tokens' logprobs to a loss for each token.

The function is called with a ``TokenView``. It has the student's logprobs with graph (of the sampled token, and at the
teacher's listed ids), the teacher's rows, and the logprobs that the tokens were sampled with. The returned losses are
summed over the trained tokens of the step and divided by their number. Masks, batching, the run log and checkpoints
work as for any objective.

    python examples/custom_objective.py
"""

import asyncio

import torch
from letter_task import make_output_folder, print_evaluations, train_student, train_teacher, write_rows

from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.engine.learner.token_view import TokenView


def skewed_kl(view: TokenView, alpha: float = 0.1) -> torch.Tensor:
    """KL(T || alpha T + (1 - alpha) S) on the teacher's list: finite even where the student has probability zero."""
    teacher_p = view.teacher.logp.exp()  # zero at pads
    mixed = torch.logaddexp(
        view.teacher.logp + torch.log(torch.tensor(alpha)), view.logp_at_ids + torch.log(torch.tensor(1.0 - alpha))
    )
    listed = view.teacher.listed & (teacher_p > 0)
    return torch.where(listed, teacher_p * (view.teacher.logp - mixed.masked_fill(~listed, 0.0)), 0.0).sum(dim=1)


def main() -> None:
    """Train with this loss, and print divergence and accuracy."""
    here = make_output_folder(__file__)
    data = write_rows(here / "letters.jsonl", hint=None)
    config = RunConfig.model_validate(
        {
            "steps": 40,
            "student": {"model": str(train_student(here / "student"))},
            "teacher": {"kind": "local", "model": str(train_teacher(here / "teacher"))},
            "data": {"path": str(data)},
            "rollout": {"prompts_per_step": 52, "samples_per_prompt": 1, "max_completion_tokens": 3},
            "learner": {"lr": 2e-3, "warmup_steps": 5},
            "eval": {"path": str(data), "every": 20, "max_tokens": 3, "scorer": "exact_match", "prefixes": ["fixed"]},
        }
    )
    asyncio.run(train(config, here / "run", loss=skewed_kl))
    print_evaluations(here / "run")


if __name__ == "__main__":
    main()
