"""The tables of a run file that name pieces: student, teacher, data, cache, replay."""

from __future__ import annotations

import os
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from topkd.engine.frozen import Frozen
from topkd.topk.errors import ConfigError

ScoringDialect: TypeAlias = Literal["auto", "vllm", "vllm_generate", "sglang", "fireworks"]


class StudentConfig(Frozen):
    """The model that learns."""

    model: str
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"


class TeacherConfig(Frozen):
    """A server that scores. A key never stands in a config: ``api_key_env`` names the variable that holds it."""

    url: str
    model: str | None = None
    dialect: ScoringDialect = "auto"
    api_key_env: str | None = None
    revision: str = ""  # of the weights behind the name: the cache keeps revisions apart

    @field_validator("url")
    @classmethod
    def _without_a_password(cls, url: str) -> str:
        """Refused here too, before the run's folder holds a copy of the config."""
        if "@" in urlsplit(url).netloc:
            raise ValueError("a URL without user name and password; name the key's variable in api_key_env")
        return url

    def api_key(self) -> SecretStr | None:
        """The key from the environment; naming a variable that is not set is an error."""
        if self.api_key_env is None:
            return None
        value = os.environ.get(self.api_key_env)
        if not value:
            raise ConfigError(f"the environment variable {self.api_key_env} (teacher.api_key_env) is not set")
        return SecretStr(value)


class DataConfig(Frozen):
    """Where prompts come from: JSONL rows with ``prompt_ids``, ``prompt`` or ``messages``."""

    path: str
    limit: Annotated[int | None, Field(ge=1)] = None


class CacheConfig(Frozen):
    """Where scores and rollouts are kept, so that nothing is asked twice and the run can be replayed."""

    path: str
    codec: Literal["packed", "raw", "cold"] = "packed"


class ReplayConfig(Frozen):
    """How ``topkd replay`` goes through what was recorded; ``topkd train`` reads none of it.

    ``recorded`` repeats the recorded run batch by batch; ``shuffled`` draws from all recorded completions, epoch after
    epoch. ``policy`` is the recorded run's revision (``topkd cache stats`` lists them), needed when there are several.
    ``missing`` says what a score that is not there is: an error, or a lost sample, as it was to a recorded run that
    lost it (``max_lost_fraction`` holds then).
    """

    order: Literal["recorded", "shuffled"] = "recorded"
    missing: Literal["error", "lose"] = "error"
    policy: str | None = None
