"""What a checkpoint keeps of a learner: a stopped and continued run is the uninterrupted one."""

import json

import numpy as np
import pytest
import torch

from tests.engine.pieces import model_folder, topk_sample
from topkd.engine.config.learner import LearnerConfig
from topkd.engine.config.objectives import TopKPolicyGradient
from topkd.engine.learner.learner import Learner, LearnerState
from topkd.engine.models.student import Student
from topkd.topk.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


def sample(seed):
    rng = np.random.default_rng(seed)
    lists = [[(int(i), float(-1 - j)) for j, i in enumerate(rng.permutation(300)[:4])] for _ in range(3)]
    return topk_sample([3, 4], [5, 6, 7], lists, [-2.0, -3.0, -4.0], -rng.uniform(0.5, 6, 3))


def learner_of(student):
    return Learner(student, LearnerConfig(lr=1e-3, warmup_steps=3), TopKPolicyGradient())


def test_a_learner_continued_from_its_state_takes_the_same_steps(folder):
    whole = learner_of(Student.load(str(folder), "cpu"))
    records = [whole.step([sample(i)]) for i in range(4)]
    first = learner_of(Student.load(str(folder), "cpu"))
    for i in range(2):
        first.step([sample(i)])
    state = first.state_dict()
    json.dumps(state.values, allow_nan=False)
    second_student = Student.load(str(folder), "cpu")
    second_student.model.load_state_dict(first.student.model.state_dict())
    first.step([sample(9)])  # a state is a copy: what the first one does next changes nothing in it
    second = learner_of(second_student)
    second.load_state_dict(state)
    assert second.version == 2
    assert [second.step([sample(i)]) for i in (2, 3)] == records[2:]
    for name, value in whole.student.model.state_dict().items():
        assert torch.equal(value, second.student.model.state_dict()[name])


def test_optimiser_state_of_another_student_is_refused(folder):
    learner = learner_of(Student.load(str(folder), "cpu"))
    learner.step([sample(0)])
    state = learner.state_dict()
    renamed = LearnerState(state.values, {f"x{name}": value for name, value in state.tensors.items()})
    with pytest.raises(ConfigError, match="another student"):
        learner.load_state_dict(renamed)
