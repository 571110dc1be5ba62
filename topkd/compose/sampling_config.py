"""``[sampler]`` of a run file: where the student is sampled, and how its weights get there."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, field_validator

from topkd.compose.api_keys import KeyVariable, api_key
from topkd.engine.frozen import Frozen

SamplingDialect: TypeAlias = Literal["auto", "vllm", "vllm_generate", "sglang"]


class InProcessSampling(Frozen):
    """The learner's own model, in this process: new weights are there at once."""

    kind: Literal["in_process"] = "in_process"

    def shaping(self) -> dict[str, object]:
        """What of it shapes the rollouts: nothing."""
        return {}


class _Synced(Frozen):
    """What every sampler with weights of its own is told.

    Attributes:
        weights: What is pushed: the adapter, or the whole model. "auto" is what trains.
        sync_every: Versions a push. Completions of the versions between are staler by as many steps.
        folder: Where weights lie until the sampler has read them; "weights" in the run's folder when left out.
        alarm_kl: A KL(sampler || learner) of one version, in nats, that is worth an alarm in the diary.
        limit_kl: One that ends the run: these are other weights, or not the policy's own probabilities.
    """

    weights: Literal["auto", "lora", "full"] = "auto"
    sync_every: PositiveInt = 1
    folder: str | None = None
    alarm_kl: PositiveFloat = 0.02
    limit_kl: PositiveFloat = 1.0

    def shaping(self) -> dict[str, object]:
        """What of it shapes the rollouts of a run; where the server is does not."""
        return {"sampler": self.model_dump(mode="json", include={"kind", "weights", "sync_every"})}


class ServerSampling(_Synced):
    """A server that samples the student. It must serve the student's base model, and be able to read ``folder``."""

    kind: Literal["server"] = "server"
    url: str
    dialect: SamplingDialect = "auto"
    model: str | None = None
    api_key_env: KeyVariable | None = None

    @field_validator("url")
    @classmethod
    def _without_a_password(cls, url: str) -> str:
        """Refused here too, before the run's folder holds a copy of the config."""
        if "@" in urlsplit(url).netloc:
            raise ValueError("a URL without user name and password; name the key's variable in api_key_env")
        return url

    def api_key(self) -> SecretStr | None:
        """The key from the environment; naming a variable that is not set is an error."""
        return api_key(self.api_key_env, said="sampler.api_key_env")


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
