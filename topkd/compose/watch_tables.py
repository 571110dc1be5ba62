"""The tables of a run file that say how a run is watched: evaluation while it trains, and trackers beside the diary."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from topkd.engine.frozen import Frozen

Better = Literal["accuracy", "reverse_kl", "forward_kl", "jsd", "agreement"]


class EvalConfig(Frozen):
    """``[eval]``: what is measured before the first step, every ``every`` steps and after the last.

    With a ``scorer`` the student answers the prompts of ``path`` and each answer is scored; ``ceiling`` has the teacher
    answer them once. With ``teacher`` (a folder of the teacher's weights on this machine, measured on and never learnt
    from; not needed for a local or a self teacher) the exact divergences over the whole vocabulary are taken too.

    Attributes:
        path: Prompts to measure on, in any form that ``[data] path`` takes.
        every: Steps between measurements; 0 takes the run's ``eval_every``, which is 0 (before and after only).
        limit: Prompts at most.
        max_tokens: Of an answer.
        temperature: Of the answers that are scored; 0 takes the most likely token each time.
        samples: Answers to each prompt (their scores are averaged).
        scorer: "exact_match", "numeric_match" (both against the row's ``answer``), or ``module:function`` or
            ``file.py:function``: (row, completion) -> float.
        ceiling: Have the teacher answer too.
        teacher: Folder of the teacher's weights, for exact divergences.
        prefixes: What the divergences are taken on: ``fixed`` is what the untrained student wrote, ``fresh`` what the
            student writes now, ``teacher`` what the teacher writes; ``[]`` takes none.
        best: Metric whose best student is kept in ``student-best``; None keeps none.
    """

    path: str
    every: Annotated[int, Field(ge=0)] = 0
    limit: PositiveInt = 256
    max_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    samples: PositiveInt = 1
    scorer: str | None = None
    ceiling: bool = True
    teacher: str | None = None
    prefixes: tuple[Literal["fixed", "fresh", "teacher"], ...] = ("fixed", "fresh")
    best: Better | None = None

    @model_validator(mode="after")
    def _measures_something(self) -> EvalConfig:
        if self.best == "accuracy" and self.scorer is None:
            raise ValueError("a scorer, for best = 'accuracy'")
        if self.samples > 1 and self.temperature == 0.0:
            raise ValueError("a temperature above 0 for several samples: at 0 they are all the same")
        return self


class TrackConfig(Frozen):
    """``[track]``: who else is told what the diary is told.

    TensorBoard files go to ``tensorboard/`` in the run's folder. A wandb run is named after that folder and continued
    when the run is resumed; where it writes, and whether it is online, is wandb's own matter (WANDB_MODE, WANDB_DIR).
    """

    tensorboard: bool = False
    wandb_project: str | None = None
    wandb_entity: str | None = None
