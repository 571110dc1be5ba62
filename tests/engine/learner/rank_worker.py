"""What each rank of the two-process tests runs: some learner steps on its share of fixed samples."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from tests.engine.pieces import VOCAB, topk_sample
from topkd.engine.config.learner import LearnerConfig
from topkd.engine.config.objectives import TAID, Objective, TopKPolicyGradient
from topkd.engine.learner.distributed import Ranks
from topkd.engine.learner.learner import Learner
from topkd.engine.models.student import Student
from topkd.topk.samples import TextSample

STEPS = 3


def objective_named(name: str) -> Objective:
    """The objectives the tests compare."""
    return TAID() if name == "taid" else TopKPolicyGradient()


def samples_of(step: int) -> list:
    """Seven samples of different lengths, one with a hole: ranks get different numbers of tokens and micro-batches."""
    rng = np.random.default_rng(step)
    samples = []
    for i in range(7):
        prompt, length = [3 + i] * (1 + i % 3), 2 + 3 * i
        completion = rng.integers(1, VOCAB, length).tolist()
        lists = []
        for t in range(length):
            ids = rng.choice(VOCAB, 4, replace=False)
            p = rng.dirichlet(np.ones(6))[:4]
            lists.append(
                None if (i, t) == (2, 1) else [(int(v), float(np.log(q))) for v, q in zip(ids, p, strict=True)]
            )
        drawn, behavior = -rng.uniform(0.5, 6, length), -rng.uniform(4.5, 6.5, length)
        actual = [dict(row or ()).get(token, logp) for row, token, logp in zip(lists, completion, drawn, strict=True)]
        samples.append(topk_sample(prompt, completion, lists, actual, behavior))
    return samples


def texts_of(step: int) -> list[TextSample]:
    """Three texts: one rank gets two of them."""
    return [TextSample(sample.core) for sample in samples_of(step + 100)[:3]]


def run(folder: str, objective: str, strategy: str, ranks: Ranks, state: Path | None = None) -> tuple[Student, list]:
    """``STEPS`` steps; with ``state`` the optimiser is kept after the first and put back into a fresh learner."""
    config = LearnerConfig(lr=1e-3, micro_batch_tokens=40, schedule="linear", warmup_steps=1, strategy=strategy)

    def fresh() -> Learner:
        student = Student.load(folder, "cpu")
        return Learner(student, config, objective_named(objective), steps=STEPS, ranks=ranks, stop_ids=[7])

    learner = fresh()
    records = []
    for step in range(STEPS):
        records.append(learner.step(ranks.slice(samples_of(step)), ranks.slice(texts_of(step))))
        if state is not None and step == 0:
            kept, weights = learner.state_dict(), learner.student.model.state_dict()
            learner = fresh()
            learner.student.model.load_state_dict(weights)
            learner.load_state_dict(kept)
    return learner.student, records


def main() -> None:
    folder, objective, strategy, out = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    student, records = run(folder, objective, strategy, ranks, state=Path(out))
    everyone = ranks.gather(records)
    assert str(everyone[0]) == str(everyone[1]), "ranks report different records"
    if ranks.main:
        torch.save(student.model.state_dict(), f"{out}/weights.pt")
        Path(out, "records.json").write_text(json.dumps(records))
    ranks.close()


if __name__ == "__main__":
    main()
