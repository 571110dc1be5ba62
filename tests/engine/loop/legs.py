"""Runs in parts for tests of the loop: stopped, broken and resumed, on tiny models in this process."""

import asyncio

import pytest

from topkd.engine.checkpoint.checkpoint import find_newest_checkpoint, restore, save_checkpoint
from topkd.engine.config.engine_config import CheckpointConfig, EngineConfig, RolloutConfig
from topkd.engine.config.learner import LearnerConfig
from topkd.engine.learner.learner import Learner
from topkd.engine.loop.hooks import Hooks, Position
from topkd.engine.loop.loop import LoopParts, distil
from topkd.engine.loop.metrics import MetricsLog, drop_timings, read_metrics
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.models.local_teacher import LocalTeacher
from topkd.engine.models.sampler import InProcessSampler
from topkd.engine.models.student import Student

ROWS = [PromptRow([5 + i, 9], [5 + i, 9], "", f"row{i}") for i in range(12)]


class Breaks:
    """Lets one call of one stage fail."""

    def __init__(self, broken):
        self.broken, self.calls = broken or ("", 0, None), 0

    def count(self, stage):
        if stage == self.broken[0]:
            self.calls += 1
            if self.calls == self.broken[1]:
                raise self.broken[2]

    def wrap(self, stage, work):
        async def called(*args, **more):
            self.count(stage)
            return await work(*args, **more)

        return called

    def sync(self, stage, work):
        def called(*args, **more):
            self.count(stage)
            return work(*args, **more)

        return called


class Copying(InProcessSampler):
    """A sampler with weights of its own: publish(v) loads what capture(v) kept, as a server would."""

    def __init__(self, student, folder):
        super().__init__(Student.load(folder, "cpu"))
        self.learners, self.kept = student, {}

    def capture(self, version):
        weights = self.learners.model.state_dict()
        self.kept[version] = {name: value.clone() for name, value in weights.items()}

    async def publish(self, version):
        self.student.model.load_state_dict(self.kept.pop(version))
        self.version = str(version)
        return {"synced": version}


async def leg(
    folders,
    out,
    *,
    steps=9,
    staleness=1,
    stop_at=None,
    own_weights=False,
    every=100,
    remembered=False,
    broken=None,
    on_record=lambda kind, record: None,
):
    """A run, or what is left of it: from the newest checkpoint of ``out`` to its end or to ``stop_at``.

    ``broken`` is (stage, call, error): the call of that number, from 1, raises the error; ``on_record`` sees each
    record as it is written.
    """
    engine = EngineConfig(
        steps=steps, seed=3, k=20, max_staleness=staleness, eval_every=4,
        rollout=RolloutConfig(prompts_per_step=6, samples_per_prompt=1, max_completion_tokens=6),
        learner=LearnerConfig(lr=3e-3, warmup_steps=4), checkpoint=CheckpointConfig(every=every),
    )  # fmt: skip
    student, teacher = (Student.load(str(folder), "cpu") for folder in folders)
    sampler = Copying(student, str(folders[0])) if own_weights else InProcessSampler(student)
    learner = Learner(student, engine.learner, engine.objective, lock=sampler.lock, steps=steps)
    start, stop = Position(), asyncio.Event()
    breaks = Breaks(broken)
    if (found := find_newest_checkpoint(out, pytest.fail)) is not None:
        restore(found, learner)
        start = found.position
        (out / "metrics.jsonl").write_bytes((out / "metrics.jsonl").read_bytes()[: found.run_log_bytes])

    async def label(version):
        sampler.version = str(version)

    learner.step = breaks.sync("learner", learner.step)
    sampler.sample_batch = breaks.wrap("sampler", sampler.sample_batch)
    scorer = LocalTeacher(teacher)
    scorer.score = breaks.wrap("scorer", scorer.score)

    def norm():
        return {"norm": float(sum(p.detach().norm() for p in student.model.parameters()))}

    def heard(kind, record):
        on_record(kind, record)
        if kind == "step" and record["step"] == stop_at:
            stop.set()

    with MetricsLog(out / "metrics.jsonl") as log:

        def kept(position):
            save_checkpoint(
                out, position, learner=learner, run_log_bytes=log.kept(), keep=2, remembered=remembered, notes={"a": 1}
            )

        await distil(
            LoopParts(
                engine, ROWS, sampler, {"": scorer}, earlier=read_metrics(out / "metrics.jsonl", "step"), stop=stop
            ),
            learner,
            log,
            hooks=Hooks(
                evaluate=breaks.sync("evaluate", norm),
                on_record=heard,
                publish=breaks.wrap("publish", sampler.publish if own_weights else label),
                on_batch=breaks.sync("on_batch", lambda step, batch: None),
                capture=breaks.sync("capture", sampler.capture) if own_weights else None,
                checkpoint=kept,
            ),
            start=start,
        )
    return learner


def told(out):
    return [drop_timings(record) for record in read_metrics(out / "metrics.jsonl")]
