"""Training: sample, score, learn, checkpoint.

Knows: torch, the student, the order of things. Does not know: HTTP, files of scores. Importing the package
loads no torch: take what you need from its modules (``topkd.engine.loop.loop``, ``topkd.engine.learner.learner``, ...).
"""

from topkd.engine.config.engine_config import EngineConfig, RolloutConfig
from topkd.engine.config.learner import LearnerConfig

__all__ = ["EngineConfig", "LearnerConfig", "RolloutConfig"]
