"""What engine tests build on: tiny models made on the spot, and samples with known contents."""

from pathlib import Path

import numpy as np

from tests.fakes.tinymodels import make_tiny_model
from topkd.topk import SampleCore, ScalarBehavior, ScalarPreparedSample, TopK, TopKPreparedSample

VOCAB = 300


def model_folder(folder: Path, *, seed: int = 1, hidden: int = 32, layers: int = 2) -> Path:
    """A random Qwen2 of 300 tokens, sharp enough that its choices are not uniform."""
    make_tiny_model(folder, arch="qwen2", seed=seed, hidden=hidden, layers=layers, vocab=VOCAB)
    return folder


def scalar_sample(prompt, completion, teacher_logp, behavior_logp, mask=None):
    core = SampleCore(
        np.array([*prompt, *completion]),
        len(prompt),
        np.ones(len(completion), dtype=bool) if mask is None else np.array(mask, dtype=bool),
        np.array(prompt),
    )
    return ScalarPreparedSample(core, ScalarBehavior(np.float32(behavior_logp)), np.float32(teacher_logp))


def topk_sample(prompt, completion, lists, teacher_logp, behavior_logp, mask=None):
    core = scalar_sample(prompt, completion, teacher_logp, behavior_logp, mask).core
    teacher = TopK.from_lists(lists, start=len(prompt) - 1, actual_ids=completion, actual_logp=np.float32(teacher_logp))
    return TopKPreparedSample(core, ScalarBehavior(np.float32(behavior_logp)), teacher)
