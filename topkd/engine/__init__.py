"""Moving samples and taking steps.

Knows: torch, the student, the order of things. Does not know: HTTP, files of scores. Importing the package
loads no torch: take what you need from its modules (``topkd.engine.loop``, ``topkd.engine.learner``, ...).
"""

from topkd.engine.config import EngineConfig, RolloutConfig
from topkd.engine.learner_config import LearnerConfig

__all__ = ["EngineConfig", "LearnerConfig", "RolloutConfig"]
