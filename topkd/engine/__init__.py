"""Training: sample, score, learn, checkpoint.

Knows: torch, the student, the order of a run's stages. Does not know: HTTP, the score cache. Importing this package
does not import torch: import from its modules (``topkd.engine.loop.loop``, ``topkd.engine.learner.learner``, ...).
"""

from topkd.engine.config.engine_config import EngineConfig, RolloutConfig
from topkd.engine.config.learner import LearnerConfig

__all__ = ["EngineConfig", "LearnerConfig", "RolloutConfig"]
