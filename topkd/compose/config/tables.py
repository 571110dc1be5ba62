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
    chat_template: str | None = None  # a Jinja file, where the tokenizer has none or another is wanted
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


def _check_no_password(urls: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Refuse a password while the config is read, before the run's folder holds a copy of it."""
    for url in (urls,) if isinstance(urls, str) else urls:
        if "@" in urlsplit(url).netloc:
            raise ValueError("a URL without user name and password; name the key's variable in api_key_env")
    return urls


class TeacherConfig(Frozen):
    """The teacher. A key never stands in a config: ``api_key_env`` names the variable that holds it.

    ``server`` is asked over HTTP at ``url``, and an id at or past ``vocab_size`` is a fault of its reply (left out,
    such ids are a padded teacher's, and their probability is tail); ``local`` is a folder (``model``) opened in this
    process; ``self`` is the student behind another prompt, at weights that follow it: after each step ``ema`` of them
    stays (1: the weights the run began with; 0: always the student's own). ``tokenizer`` is the teacher's, where it is
    at hand: its ends of text are compared with the student's. ``chat_template`` and ``chat_template_kwargs`` render
    the teacher's prompts; left out, they are the student's.
    """

    kind: Literal["server", "local", "self"] = "server"
    # Several are replicas of one teacher, seen to agree before the run.
    url: Annotated[str | tuple[str, ...], AfterValidator(_check_no_password)] = ""
    model: str | None = None
    ema: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    dialect: ScoringDialect = "auto"
    api_key_env: KeyVariable | None = None
    revision: str = ""  # of the weights behind the name: the cache keeps revisions apart
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
        """Return every replica's URL; most teachers have one, a teacher without a server none."""
        return (self.url,) * bool(self.url) if isinstance(self.url, str) else self.url

    def api_key(self) -> SecretStr | None:
        """Read the key from the environment; naming a variable that is not set is an error."""
        return read_api_key(self.api_key_env, source="teacher.api_key_env")


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

    def list_changed(self) -> list[str]:
        """List the columns whose templates were set; of a config that was saved whole, those unlike the defaults."""
        changed = [name for name in PRIVILEGED if name in self.model_fields_set]
        if len(changed) < len(PRIVILEGED):
            return changed
        return [name for name in changed if getattr(self, name) != type(self).model_fields[name].default]


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


class InProcessSampling(Frozen):
    """The learner's own model, in this process: new weights are there at once."""

    kind: Literal["in_process"] = "in_process"

    def shaping(self) -> dict[str, object]:
        """Return what of it shapes the rollouts: nothing."""
        return {}


class _Synced(Frozen):
    """The settings of every sampler with weights of its own.

    Attributes:
        weights: What is pushed: the adapter, or the whole model. "auto" is what trains.
        sync_every: Versions a push. Completions of the versions between are staler by as many steps.
        folder: Where weights lie until the sampler has read them; "weights" in the run's folder when left out.
        alarm_kl: A KL(sampler || learner) of one version, in nats, that is worth an alarm in the run log.
        limit_kl: One that ends the run: these are other weights, or not the policy's own probabilities.
    """

    weights: Literal["auto", "lora", "full"] = "auto"
    sync_every: PositiveInt = 1
    folder: str | None = None
    alarm_kl: PositiveFloat = 0.02
    limit_kl: PositiveFloat = 1.0

    def shaping(self) -> dict[str, object]:
        """Return what of it shapes the rollouts of a run; where the server is does not."""
        return {"sampler": self.model_dump(mode="json", include={"kind", "weights", "sync_every"})}


class ServerSampling(_Synced):
    """A server that samples the student. It must serve the student's base model, and be able to read ``folder``."""

    kind: Literal["server"] = "server"
    url: Annotated[str, AfterValidator(_check_no_password)]
    dialect: SyncedDialect = "auto"
    model: str | None = None
    api_key_env: KeyVariable | None = None

    def api_key(self) -> SecretStr | None:
        """Read the key from the environment; naming a variable that is not set is an error."""
        return read_api_key(self.api_key_env, source="sampler.api_key_env")


class VllmSampling(_Synced):
    """vLLM in this process, beside the learner and on its device.

    Attributes:
        memory_fraction: Share of the device's memory that vLLM takes; the learner needs the rest.
        sleep: Give that memory back while the learner works. Only where the device has it (CUDA).
        dtype: Of its weights; "auto" is the student's own.
        max_model_len: Longest prompt and completion together; the model's own limit when left out.
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
    """``[eval]``: what is measured before the first step, every ``every`` steps and after the last.

    With a ``scorer`` the student answers the prompts of ``path`` and each answer is scored; ``ceiling`` has the teacher
    answer them once. With ``teacher`` (a folder of the teacher's weights on this machine, measured on and never learnt
    from; not needed for a local or a self teacher) the exact divergences over the whole vocabulary are taken too.

    Attributes:
        path: Prompts to measure on, in any form that ``[data] path`` takes.
        every: Steps between measurements; 0 takes the run's ``eval_every``, which is 0 (before and after only).
        limit: Prompts at most.
        max_tokens: Of an answer.
        temperature: Of the answers that are scored; 0 takes the most likely token each time.
        samples: Answers to each prompt (their scores are averaged).
        scorer: "exact_match", "numeric_match" (both against the row's ``answer``), or ``module:function`` or
            ``file.py:function``: (row, completion) -> float.
        ceiling: Have the teacher answer too.
        teacher: Folder of the teacher's weights, for exact divergences.
        prefixes: What the divergences are taken on: ``fixed`` is what the untrained student wrote, ``fresh`` what the
            student writes now, ``teacher`` what the teacher writes; ``[]`` takes none.
        best: Metric whose best student is kept in ``student-best``; None keeps none.
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
    """``[track]``: where else the run log's numbers are shown.

    TensorBoard files go to ``tensorboard/`` in the run's folder. A wandb run is named after that folder and continued
    when the run is resumed; where it writes, and whether it is online, is wandb's own matter (WANDB_MODE, WANDB_DIR).
    """

    tensorboard: bool = False
    wandb_project: str | None = None
    wandb_entity: str | None = None
