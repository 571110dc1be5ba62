"""Files that the demo writes for a first run: a run file, and the models and prompts that it names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from topkd.engine import EngineConfig

FOLDER, PORT = "first-run", 8000

_RUN = """\
# The demo's pair as a run of your own. In one terminal, until it says "ready":
#     topkd serve {teacher} --port {port}
# In another:
#     topkd train {run} --out runs/first
#     topkd report runs/first
steps = {steps}
seed = {seed}
k = {k}                       # entries of the teacher's list

[student]
model = {student_q}

[teacher]
url = "http://127.0.0.1:{port}"

[data]
path = {prompts_q}   # rows such as {{"prompt": "def add(a, b):"}}

[objective]
kind = "topk_pg"             # see docs/how-to/objectives.md for the others
beta = 0.5                   # weight of the teacher in the mixture
lam = 0.3                    # share of the sampled tail

[rollout]
prompts_per_step = {prompts_per_step}
samples_per_prompt = {samples_per_prompt}
max_completion_tokens = {max_completion_tokens}

[learner]
lr = {lr}                   # for all weights of a tiny model; a real model needs about 2e-6, a LoRA adapter 1e-4
warmup_steps = {warmup_steps}

[eval]                       # reads the teacher's weights, only to measure; remove it if you do not have them
path = {held_out_q}
every = {eval_every}
max_tokens = {max_completion_tokens}
teacher = {teacher_q}
"""


def write_first_run(
    folder: Path,
    config: EngineConfig,
    *,
    teacher: Path,
    student: Path,
    prompts: Sequence[str],
    held_out: Sequence[str],
) -> Path:
    """Write ``run.toml``, with the models and prompts beside it, by absolute paths; return its path."""
    folder = folder.absolute()
    folder.mkdir(parents=True)
    shutil.copytree(teacher, folder / "teacher")
    shutil.copytree(student, folder / "student")
    for name, texts in (("prompts", prompts), ("held-out", held_out)):
        lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    run = folder / "run.toml"
    paths = {
        "teacher": folder / "teacher", "student": folder / "student", "prompts": folder / "prompts.jsonl",
        "held_out": folder / "held-out.jsonl",
    }  # fmt: skip
    settings = {
        "steps": config.steps, "seed": config.seed, "k": config.k, "port": PORT, "lr": config.learner.lr,
        "warmup_steps": config.learner.warmup_steps, "eval_every": config.eval_every,
        **config.rollout.model_dump(include={"prompts_per_step", "samples_per_prompt", "max_completion_tokens"}),
    }  # fmt: skip
    # A JSON string is also a TOML string, unless JSON escapes a character as two surrogates.
    quoted = {f"{name}_q": json.dumps(str(path), ensure_ascii=False) for name, path in paths.items()}
    run.write_text(_RUN.format(run=run, teacher=paths["teacher"], **settings, **quoted), encoding="utf-8")
    return run
