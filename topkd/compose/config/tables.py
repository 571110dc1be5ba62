"""The tables of a run file: student, teacher, data, cache, replay, sampler, eval, track."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, SecretStr, model_validator

from topkd.clients.dialects.records import list_dialects
from topkd.compose.config.api_keys import KeyVariable, read_api_key
from topkd.engine.config.learner import Frozen, LoRAConfig


def _check_dialect(**wanted: bool) -> AfterValidator:
    """Return a validator for the names of the dialects with these abilities."""

    def check(name: str) -> str:
        names = list_dialects(**wanted)
        if name not in names:
            raise ValueError(f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}")
        return name

    return AfterValidator(check)


ScoringDialect: TypeAlias = Annotated[str, _check_dialect(scores=True)]
SyncedDialect: TypeAlias = Annotated[str, _check_dialect(syncs=True)]
SamplingDialect: TypeAlias = Annotated[str, _check_dialect(samples=True, chats=True)]
PRIVILEGED = ("reference", "feedback", "hint")  # in the order in which they are put around a prompt


class StudentConfig(Frozen):
    """The model that learns."""

    model: str
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoRAConfig | None = None
    chat_template: str | None = None  # a Jinja file; None uses the tokenizer's template
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


def _check_no_password(urls: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Refuse a URL with a password, before a copy of the config is written to the run folder."""
    for url in (urls,) if isinstance(urls, str) else urls:
        if "@" in urlsplit(url).netloc:
            raise ValueError("a URL without user name and password; name the key's variable in api_key_env")
    return urls


class TeacherConfig(Frozen):
    """The teacher. A config never holds an API key: ``api_key_env`` names the variable that holds it.

    ``kind``: ``server`` is a server at ``url``; a reply with an id of ``vocab_size`` or more is an error (without
    ``vocab_size``, ids outside the student's vocabulary count as tail). ``local`` loads the folder ``model`` in this
    process. ``self`` is the student with another prompt and averaged weights: each step keeps the share ``ema`` of
    them (1: the weights at the start of the run; 0: always the student's). ``tokenizer`` is the teacher's tokenizer, if
    it is available: its end-of-text ids are compared with the student's. ``chat_template`` and
    ``chat_template_kwargs`` render the teacher's prompts; None uses the student's.
    """

    kind: Literal["server", "local", "self"] = "server"
    # Several URLs are replicas of one teacher; that they agree is checked before the run.
    url: Annotated[str | tuple[str, ...], AfterValidator(_check_no_password)] = ""
    model: str | None = None
    ema: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    dialect: ScoringDialect = "auto"
    api_key_env: KeyVariable | None = None
    revision: str = ""  # revision of the weights; the cache stores each revision separately
    vocab_size: PositiveInt | None = None

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
        """Return the URLs of all replicas: usually one; none for a teacher without a server."""
        return (self.url,) * bool(self.url) if isinstance(self.url, str) else self.url

    def api_key(self) -> SecretStr | None:
        """Read the key from the environment; raise ConfigError if the variable is not set."""
        return read_api_key(self.api_key_env, source="teacher.api_key_env")


class PrivilegedConfig(Frozen):
    """Templates that put a row's ``hint``, ``reference`` and ``feedback`` columns into the teacher's prompt only.

    Each template contains its own column, as in ``{hint}``. A template with ``{prompt}`` replaces the text prompt or
    the last user message. One without it becomes the system message, or goes before a prompt of text or ids.
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

    def list_changed(self) -> list[str]:
        """List the columns whose templates were set; if all were (a saved config), those that are not the default."""
        changed = [name for name in PRIVILEGED if name in self.model_fields_set]
        if len(changed) < len(PRIVILEGED):
            return changed
        return [name for name in changed if getattr(self, name) != type(self).model_fields[name].default]


class DataConfig(Frozen):
    """Where prompts come from: JSONL, Parquet or a saved dataset with ``prompt_ids``, ``prompt`` or ``messages``.

    Attributes:
        path: The file or folder.
        limit: Largest number of rows.
        teacher_column: The column with the id of a row's teacher.
        turns: Which part of a conversation is the completion: the last assistant message, or everything from the first
            assistant message on (only the assistant's tokens are trained).
        privileged: Templates for text that only the teacher sees.
        feedback: ``module:function`` or ``file.py:function``: (row, completion) -> text or None. The teacher's prompt
            gets the text as feedback on the completion that is scored.
    """

    path: str
    limit: Annotated[int | None, Field(ge=1)] = None
    teacher_column: str = "teacher_id"
    turns: Literal["last", "all"] = "last"
    privileged: PrivilegedConfig = PrivilegedConfig()
    feedback: str | None = None


class CacheConfig(Frozen):
    """The cache of scores and rollouts: nothing is requested twice, and the run can be replayed."""

    path: str
    codec: Literal["packed", "raw", "cold"] = "packed"


class ReplayConfig(Frozen):
    """How ``topkd replay`` uses a recorded run; ``topkd train`` ignores this table.

    ``order``: ``recorded`` repeats the run batch by batch; ``shuffled`` takes all recorded completions in random order,
    epoch after epoch. ``policy`` is the revision of the recorded run (``topkd cache stats`` lists them); it is needed
    if the cache has several. ``missing``: a missing score is an error, or its sample is lost, as in a recorded run
    that lost it (``max_lost_fraction`` then applies).
    """

    order: Literal["recorded", "shuffled"] = "recorded"
    missing: Literal["error", "lose"] = "error"
    policy: str | None = None


class InProcessSampling(Frozen):
    """Sampling from the learner's own model in this process, which always has the new weights."""

    kind: Literal["in_process"] = "in_process"

    def shaping(self) -> dict[str, object]:
        """Return the settings of this sampler that affect the rollouts: none."""
        return {}


class _Synced(Frozen):
    """The settings of every sampler with its own copy of the weights.

    Attributes:
        weights: What is sent: the adapter, or the whole model. "auto" sends what is trained.
        sync_every: Send every n-th version. In between, completions come from older weights.
        folder: Folder for weights that the sampler has yet to read; None takes "weights" in the run's folder.
        alarm_kl: KL(sampler || learner) at one version, in nats, above which the run log gets an alarm.
        limit_kl: The same KL, above which the run ends: the sampler has other weights, or changes probabilities.
    """

    weights: Literal["auto", "lora", "full"] = "auto"
    sync_every: PositiveInt = 1
    folder: str | None = None
    alarm_kl: PositiveFloat = 0.02
    limit_kl: PositiveFloat = 1.0

    def shaping(self) -> dict[str, object]:
        """Return the settings of this sampler that affect a run's rollouts; the server's address is not one."""
        return {"sampler": self.model_dump(mode="json", include={"kind", "weights", "sync_every"})}


class ServerSampling(_Synced):
    """A server that samples the student. It must serve the student's base model, and be able to read ``folder``."""

    kind: Literal["server"] = "server"
    url: Annotated[str, AfterValidator(_check_no_password)]
    dialect: SyncedDialect = "auto"
    model: str | None = None
    api_key_env: KeyVariable | None = None

    def api_key(self) -> SecretStr | None:
        """Read the key from the environment; raise ConfigError if the variable is not set."""
        return read_api_key(self.api_key_env, source="sampler.api_key_env")


class VllmSampling(_Synced):
    """vLLM in the learner's process, on the same device.

    Attributes:
        memory_fraction: Share of the device's memory that vLLM takes; the learner needs the rest.
        sleep: Release that memory while the learner works (CUDA only).
        dtype: Dtype of vLLM's weights; "auto" takes the student's.
        max_model_len: Largest length of a prompt with its completion; None takes the model's limit.
    """

    kind: Literal["vllm"] = "vllm"
    memory_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.35
    sleep: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: PositiveInt | None = None
    enforce_eager: bool = False


SamplerConfig: TypeAlias = Annotated[InProcessSampling | ServerSampling | VllmSampling, Field(discriminator="kind")]


Better = Literal["accuracy", "reverse_kl", "forward_kl", "jsd", "agreement"]


class EvalConfig(Frozen):
    """``[eval]``: what to measure before the first step, every ``every`` steps and after the last.

    With a ``scorer``, the student answers the prompts of ``path`` and each answer is graded; with ``ceiling`` the
    teacher also answers them, once. With ``teacher`` (a folder of the teacher's weights, used only to measure; a local
    or a self teacher does not need it) the exact divergences over the whole vocabulary are measured too.

    Attributes:
        path: Prompts to measure on, in any form that ``[data] path`` takes.
        every: Steps between measurements; 0 takes the run's ``eval_every`` (0 there: only before and after the run).
        limit: Largest number of prompts.
        max_tokens: Largest number of tokens of an answer.
        temperature: Temperature of the graded answers; 0 always takes the most likely token.
        samples: Answers to each prompt; their grades are averaged.
        scorer: "exact_match", "numeric_match" (both compare with the row's ``answer``), or ``module:function`` or
            ``file.py:function``: (row, completion) -> float.
        ceiling: Whether the teacher answers too.
        teacher: Folder of the teacher's weights, for exact divergences.
        prefixes: Completions to measure divergences on: ``fixed``, which the untrained student wrote, ``fresh``, which
            the student writes now, ``teacher``, which the teacher writes; ``[]`` measures none.
        best: Metric by which the best student is kept in ``student-best``; None keeps none.
    """

    path: str
    every: Annotated[int, Field(ge=0)] = 0
    limit: PositiveInt = 256
    max_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    samples: PositiveInt = 1
    scorer: str | None = None
    ceiling: bool = True
    teacher: str | None = None
    prefixes: tuple[Literal["fixed", "fresh", "teacher"], ...] = ("fixed", "fresh")
    best: Better | None = None

    @model_validator(mode="after")
    def _measures_something(self) -> EvalConfig:
        if self.best == "accuracy" and self.scorer is None:
            raise ValueError("a scorer, for best = 'accuracy'")
        if self.samples > 1 and self.temperature == 0.0:
            raise ValueError("a temperature above 0 for several samples: at 0 they are all the same")
        return self


class TrackConfig(Frozen):
    """``[track]``: other tools that show the numbers of the run log.

    TensorBoard files go to ``tensorboard/`` in the run's folder. A wandb run is named after that folder and continued
    when the run is resumed. WANDB_MODE and WANDB_DIR decide whether it is online and where it writes.
    """

    tensorboard: bool = False
    wandb_project: str | None = None
    wandb_entity: str | None = None
