"""The student of a run, loaded."""

from __future__ import annotations

from typing import Any

from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.run_prompts import Prompts
from topkd.compose.preflight.lengths import check_token_ids_fit


def load_student(config: RunConfig, prompts: Prompts) -> Any:
    """Load the config's student and check that it has every id of the prompts."""
    from topkd.engine.models.student import Student

    model = config.student
    student = Student.load(model.model, model.device, model.dtype, lora=model.lora, seed=config.seed)
    check_token_ids_fit(config, prompts.rows, student.vocab_size)
    return student
