"""The tables of a run file that name pieces: student, teacher, data, cache, replay."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, SecretStr, field_validator, model_validator

from topkd.compose.api_keys import KeyVariable, api_key
from topkd.engine.frozen import Frozen
from topkd.engine.lora_config import LoRAConfig

ScoringDialect: TypeAlias = Literal["auto", "vllm", "vllm_generate", "sglang", "fireworks"]
PRIVILEGED = ("reference", "feedback", "hint")  # in the order in which they are put around a prompt


class StudentConfig(Frozen):
    """The model that learns."""

    model: str
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoRAConfig | None = None
    chat_template: str | None = None  # a Jinja file, where the tokenizer has none or another is wanted
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class TeacherConfig(Frozen):
    """Who scores. A key never stands in a config: ``api_key_env`` names the variable that holds it.

    ``server`` is asked over HTTP at ``url``, and an id at or past ``vocab_size`` is a fault of its reply (left out,
    such ids are a padded teacher's, and their probability is tail); ``local`` is a folder (``model``) opened in this
    process; ``self`` is the student behind another prompt, at weights that follow it: after each step ``ema`` of them
    stays (1: the weights the run began with; 0: always the student's own). ``tokenizer`` is the teacher's, where it is
    at hand: its ends of text are compared with the student's. ``chat_template`` and ``chat_template_kwargs`` render
    the teacher's prompts; left out, they are the student's.
    """

    kind: Literal["server", "local", "self"] = "server"
    url: str | tuple[str, ...] = ""  # several are replicas of one teacher, seen to agree before the run
    model: str | None = None
    ema: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    dialect: ScoringDialect = "auto"
    api_key_env: KeyVariable | None = None
    revision: str = ""  # of the weights behind the name: the cache keeps revisions apart
    vocab_size: PositiveInt | None = None

    @field_validator("url")
    @classmethod
    def _without_a_password(cls, url: str | tuple[str, ...]) -> str | tuple[str, ...]:
        """Refused here too, before the run's folder holds a copy of the config."""
        for one in (url,) if isinstance(url, str) else url:
            if "@" in urlsplit(one).netloc:
                raise ValueError("a URL without user name and password; name the key's variable in api_key_env")
        return url

    @model_validator(mode="after")
    def _names_what_its_kind_needs(self) -> TeacherConfig:
        if (self.kind == "server") != bool(self.url):
            raise ValueError(
                "a url for a teacher behind a server" if self.kind == "server" else f"no url for kind {self.kind!r}"
            )
        if self.kind == "local" and not self.model:
            raise ValueError("a model folder for a teacher in this process")
        if self.kind != "server" and self.vocab_size is not None:
            raise ValueError(f"no vocab_size for kind {self.kind!r}: the weights have their own")
        if self.kind == "self" and self.model:
            raise ValueError("no model for kind 'self': the teacher is the student")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """Every replica's URL; one for most teachers, none for a teacher without a server."""
        return (self.url,) * bool(self.url) if isinstance(self.url, str) else self.url

    def api_key(self) -> SecretStr | None:
        """The key from the environment; naming a variable that is not set is an error."""
        return api_key(self.api_key_env, said="teacher.api_key_env")


class PrivilegedConfig(Frozen):
    """How a row's ``hint``, ``reference`` and ``feedback`` columns stand in the teacher's prompt alone.

    A template names its own column, as in ``{hint}``. With ``{prompt}`` in it, it takes the place of the text prompt or
    of the last user message; without, it becomes the system message, or stands before a prompt of text or ids.
    """

    hint: str = "{hint}"
    reference: str = "{prompt}\n\nA reference answer:\n{reference}\n\nNow answer in your own words."
    feedback: str = "{prompt}\n\nFeedback on an earlier attempt:\n{feedback}\n\nNow answer the question above."

    @model_validator(mode="after")
    def _each_names_its_column(self) -> PrivilegedConfig:
        for name in PRIVILEGED:
            if "{" + name + "}" not in getattr(self, name):
                raise ValueError(f"{{{name}}} in the template of {name}")
        return self

    def given(self) -> list[str]:
        """The columns whose templates were asked for; of a config that was saved whole, those unlike the defaults."""
        given = [name for name in PRIVILEGED if name in self.model_fields_set]
        if len(given) < len(PRIVILEGED):
            return given
        return [name for name in given if getattr(self, name) != type(self).model_fields[name].default]


class DataConfig(Frozen):
    """Where prompts come from: JSONL, Parquet or a saved dataset with ``prompt_ids``, ``prompt`` or ``messages``.

    Attributes:
        path: The file or folder.
        limit: Rows at most.
        teacher_column: The column that says which teacher a row has.
        turns: What of a conversation is the answer: the last assistant message, or all from the first one on (the
            assistant's tokens train, the others are masked).
        privileged: Templates of what only the teacher sees.
        feedback: ``module:function`` or ``file.py:function``: (row, completion) -> text or None, feedback on the very
            completion that is scored, for the teacher's prompt.
    """

    path: str
    limit: Annotated[int | None, Field(ge=1)] = None
    teacher_column: str = "teacher_id"
    turns: Literal["last", "all"] = "last"
    privileged: PrivilegedConfig = PrivilegedConfig()
    feedback: str | None = None


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
