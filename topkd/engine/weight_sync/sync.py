"""Keep a sampling server's weights equal to the learner's, and check which weights each completion is from.

After a step the weights are saved to a folder, pushed through a WeightSink and checked with a probe; only then are they
sampled from. The learner continues meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from topkd.engine.checkpoint.snapshots import write_folder
from topkd.engine.loop.rollouts import derive_seed
from topkd.engine.loop.scoring import LOSABLE
from topkd.engine.models.lora import head_weights, merge_adapter
from topkd.engine.models.student import Student
from topkd.topk import kl_k3
from topkd.topk.errors import ConfigError, ResponseError, SyncError, TopkdError
from topkd.topk.protocols import Ids, Sampler, Version, WeightSink, WeightUpdate
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Float32, Int32

DRAWS = 8  # tokens sampled at each context
CONTEXTS = 4
_EXACT_NATS, _DRIFT_NATS = 1e-8, 1e-5  # float32 on both sides stays below the first; other weights exceed the second
_STALE_SHARE = 0.25  # share of the squared distance to the pushed weights: below it, a server has older ones
_STALE_NATS = 1e-4  # root mean square below which versions cannot be told apart


@dataclass(frozen=True, slots=True)
class SyncProbe:
    """Contexts at which learner and sampler must have the same next-token distribution after every push.

    The learner's rows are computed when the weights are captured, so both sides are compared at one version even if the
    learner has moved on. ``kl`` is the mean of expm1(d) - d over the sampled tokens, with d = log learner - log
    sampler: an estimate of KL(sampler || learner) in nats, 0 except for rounding.

    Attributes:
        student: The learner's model.
        contexts: Prompts.
        alarm_nats: A KL above it is worth a warning.
        limit_nats: A KL above it is a SyncError: the sampler has other weights, or changes the distribution.
    """

    student: Student
    contexts: tuple[Int32, ...]
    alarm_nats: float = 0.02
    limit_nats: float = 1.0

    @classmethod
    def of(cls, student: Student, prompts: Sequence[Ids], **limits: float) -> SyncProbe:
        """Make a probe from a few evenly spaced prompts of a run."""
        places = np.unique(np.linspace(0, len(prompts) - 1, CONTEXTS).astype(int))
        return cls(student, tuple(np.asarray(prompts[place], dtype=np.int32) for place in places.tolist()), **limits)

    @torch.inference_mode()
    def rows(self) -> Float32:
        """Compute the learner's next-token logprobs at each context, float32 [contexts, V]."""
        found = []
        for context in self.contexts:  # one by one: a padded batch would round differently from the sampler
            ids = torch.from_numpy(context.astype(np.int64))[None].to(self.student.device)
            at = torch.tensor([context.size - 1], device=self.student.device)
            logits = self.student.logit_rows(ids, torch.ones_like(ids), at)
            found.append(torch.log_softmax(logits.double(), dim=-1)[0].float().cpu().numpy())
        return np.stack(found)

    async def compare(
        self,
        sampler: Sampler,
        rows: Float32,
        params: SamplingParams,
        where: str,
        *,
        first_nats: float | None = None,
        older: Mapping[str, Float32] | None = None,
    ) -> dict[str, Any]:
        """Sample a few tokens, and compare their logprobs with the learner's ``rows``.

        Args:
            sampler: The sampler to check.
            rows: The learner's rows at the version that the sampler should have.
            params: Sampling parameters.
            where: The server, for messages.
            first_nats: The KL at the first push. If it was as small as float32 rounding, the alarm limit is much lower,
                to find a part of the weights that was not updated (an old output head). It is not used for a bfloat16
                student: a new adapter adds exact zeros, and the first step's rounding is 1e-4.
            older: Rows of weights that the sampler had before, by their name in messages.

        Raises:
            SyncError: The logprobs are not those of the pushed weights, or are those of an older version.
        """
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(sampler.sample(context, DRAWS, params)) for context in self.contexts]
        drawn = [(place, rollout) for place, task in enumerate(tasks) for rollout in task.result()]
        places, tokens = [place for place, _ in drawn], [rollout.completion_ids[0] for _, rollout in drawn]
        own_logp = rows[places, tokens].astype(np.float64)
        served_logp = np.array([rollout.logp[0] for _, rollout in drawn], dtype=np.float64)
        kl, worst = float(np.mean(kl_k3(own_logp, served_logp))), float(np.abs(own_logp - served_logp).max())
        if not kl <= self.limit_nats:  # a NaN is above every limit
            raise SyncError(
                "the sampler does not sample from the weights that were pushed",
                where=where,
                got=f"KL {kl:.3g} nats, largest difference of a token {worst:.3g} nats",
                expected=f"at most {self.limit_nats:g}",
                hint="does it serve the student's own base model, at temperature 1 and not quantised?",
            )
        distance = float(np.mean((own_logp - served_logp) ** 2))
        for name, former in (older or {}).items():
            nearer = float(np.mean((former[places, tokens] - served_logp) ** 2))
            if distance > _STALE_NATS**2 and nearer < _STALE_SHARE * distance:
                raise SyncError(
                    f"the sampler samples from {name}, not from the weights that were pushed",
                    where=where,
                    got=f"{nearer**0.5:.2g} nats from {name}",
                    expected=f"less than the {distance**0.5:.2g} nats from what was pushed",
                    hint="did the server load the new weights? these samples were not used for training",
                )
        found: dict[str, Any] = {"sync_kl": kl, "sync_worst_nats": worst}
        float32 = head_weights(self.student.head)[0].dtype == torch.float32
        exact = float32 and first_nats is not None and first_nats <= _EXACT_NATS
        alarm_nats = min(self.alarm_nats, _DRIFT_NATS) if exact else self.alarm_nats
        if kl > alarm_nats:
            found["alarms"] = [{"alarm": "sync_kl", "value": kl, "limit": alarm_nats}]
        return found


@dataclass(frozen=True, slots=True)
class Destination:
    """A place that receives weights, and its sampler.

    Attributes:
        sink: Receives the weight folders.
        sampler: Makes the sampler of a pushed update.
        weights: Returns the server's own name for its current weights, "" if it has none.
        where: Its address, for messages.
        kind: "lora" adds an adapter to the base model, "full" replaces the whole model.
        keep: Number of folders to keep: a server may read an adapter again while it lists it.
        publish_while_sampling: Whether sampling under way keeps its version during a push.
    """

    sink: WeightSink
    sampler: Callable[[WeightUpdate], Sampler]
    weights: Callable[[], Awaitable[Version]]
    where: str
    kind: Literal["full", "lora"]
    keep: int = 1
    publish_while_sampling: bool = False


class SyncedSampler:
    """A batch sampler that has the learner's weights as last published.

    If a server changes weights in place, a push waits for sampling under way; with adapters it serves several versions
    side by side. A completion from any other version is a SyncError, never a sample.

    Args:
        student: The learner's model.
        destination: The server that samples from it.
        folder: Where captured weights are written; the server must be able to read it.
        probe: Checks every push.
        stop_ids: Ids that end a completion, sent with every request; the server's own list is not used.
        every: Push every n-th version; 1 pushes each.
        lock: Held while the learner's weights are read.
    """

    def __init__(
        self,
        student: Student,
        destination: Destination,
        *,
        folder: Path,
        probe: SyncProbe,
        stop_ids: Sequence[int] = (),
        every: int = 1,
        lock: threading.Lock | None = None,
    ) -> None:
        if destination.kind == "lora" and not student.lora:
            raise ConfigError(
                "the sampler expects a LoRA adapter, and the student trains none", hint="add [student.lora]"
            )
        self.student, self.destination, self.folder, self.probe = student, destination, folder, probe
        self.stop_ids, self.every = tuple(stop_ids), every
        self.lock = lock or threading.Lock()
        self.version = -1
        self.lost: Counter[str] = Counter()
        self._tag = secrets.token_hex(3)  # a server may still hold another run's version of the same number
        self._captured: dict[int, tuple[Path, Float32]] = {}
        self._pushed: list[Path] = []
        self._sampler: Sampler | None = None
        self._base: Version | None = None
        self._alarmed = False
        self._first_nats: float | None = None
        self._older: dict[str, Float32] = {}  # the probe's rows at weights that the sampler may still have
        self._turn = asyncio.Lock()

    def capture(self, version: int) -> None:
        """Write the learner's weights and compute the probe's rows, if this version is due; runs in a thread."""
        if self.version >= 0 and version % self.every:
            return

        def fill(folder: Path) -> None:
            model: Any = self.student.model
            if self.destination.kind == "lora":
                model.save_pretrained(folder, save_embedding_layers=False)
            else:
                merge_adapter(model).save_pretrained(folder)

        with self.lock:
            path = write_folder(self.folder / f"version-{version}", fill)
            self._captured[version] = path, self.probe.rows()
            if self.destination.kind == "lora" and "the base model" not in self._older:
                model: Any = self.student.model
                with model.disable_adapter():
                    self._older["the base model"] = self.probe.rows()

    async def publish(self, version: int) -> dict[str, Any]:
        """Push a captured version to the sampler, check it with the probe, and return the run log's values."""
        began = time.perf_counter()
        found: dict[str, Any] = {}
        if version in self._captured:
            path, rows = self._captured.pop(version)
            self._pushed.append(path)
            update = WeightUpdate(self.destination.kind, str(path), f"{version}-{self._tag}")
            async with self._alone():
                confirmed = await self.destination.sink.push(update)
                if confirmed != update.version:
                    raise SyncError(
                        "the server confirms another version than was pushed", where=self.destination.where,
                        got=confirmed, expected=update.version,
                    )  # fmt: skip
                self._sampler, self.version = self.destination.sampler(update), version
                params = SamplingParams(max_tokens=1, seed=derive_seed(0, "probe", version))
                found = await self.probe.compare(
                    self._sampler,
                    rows,
                    params,
                    self.destination.where,
                    first_nats=self._first_nats,
                    older=self._older,
                )
                self._older["the version before"] = rows
                self._first_nats = found["sync_kl"] if self._first_nats is None else self._first_nats
            sounded, self._alarmed = self._alarmed, "alarms" in found
            if sounded:  # once, when it begins
                found.pop("alarms", None)
            found |= {"sync_bytes": sum(file.stat().st_size for file in path.iterdir())}
            await asyncio.to_thread(self._drop_all_but, self.destination.keep)
        lost, self.lost = dict(self.lost), Counter()
        return found | {
            "sampler_version": str(self.version),
            "sampler_lost": lost,
            "sync_s": time.perf_counter() - began,
        }

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """See ``topkd.topk.protocols.Sampler``."""
        return (await self.sample_batch([prompt_ids], n, params, k=k))[0]

    async def sample_batch(
        self, prompts: Sequence[Ids], n: int, params: SamplingParams, *, k: int = 0
    ) -> list[list[Rollout]]:
        """Sample n rollouts for each prompt, each prompt with its own seed; a failed prompt gives aborted rollouts."""
        if not params.exact:
            raise ConfigError(
                "a student on a server must be sampled at temperature 1, without truncation or penalties", got=params
            )  # fmt: skip
        async with self._alone():
            sampler, version = self._sampler, self.version
            if sampler is None:
                raise ConfigError("no weights were published yet: there is nothing to sample from")

            stops = tuple(sorted({*self.stop_ids, *params.stop_token_ids}))

            async def sample_prompt(place: int, prompt: Ids) -> list[Rollout] | TopkdError:
                seed = None if params.seed is None else derive_seed(params.seed, "prompt", place)
                own = replace(params, seed=seed, stop_token_ids=stops)
                try:
                    return await sampler.sample(prompt, n, own, k=k)
                except LOSABLE as error:
                    return error

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(sample_prompt(place, prompt)) for place, prompt in enumerate(prompts)]
            outcomes = [task.result() for task in tasks]
            drawn = [outcome for outcome in outcomes if not isinstance(outcome, TopkdError)]
            if not drawn:
                raise next(outcome for outcome in outcomes if isinstance(outcome, TopkdError))
            await self._verify([rollout for rollouts in drawn for rollout in rollouts], version, stops)
        batch: list[list[Rollout]] = []
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            rollouts = outcome
            if isinstance(rollouts, TopkdError):
                self.lost[type(rollouts).__name__] += n
                none = np.zeros(0, dtype=np.int32)
                rollouts = [Rollout(np.asarray(prompt), none, none.astype(np.float32), "abort", params)] * n
            batch.append([replace(rollout, version=str(version)) for rollout in rollouts])
        return batch

    def close(self) -> None:
        """Remove the written folders; call it when the server no longer reads them."""
        self._drop_all_but(0)
        for path, _ in self._captured.values():
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    async def _verify(self, rollouts: Sequence[Rollout], version: int, stops: Sequence[int]) -> None:
        """Check each completion: sampled from the published version, with logprobs, ended by the student's stop ids."""
        where, full, expected = self.destination.where, self.destination.kind == "full", f"{version}-{self._tag}"
        if not full and self._base is None and rollouts[0].version != expected:
            self._base = rollouts[0].version  # an adapter is requested by name; replies have its base model's version
        fitting = {expected, ""} if full else {expected, self._base}
        for rollout in rollouts:
            if rollout.version not in fitting:
                raise SyncError(
                    "a completion was sampled from other weights", where=where, got=repr(rollout.version),
                    expected=repr(expected), hint="is somebody else pushing weights to this server?",
                )  # fmt: skip
            if not np.isfinite(rollout.logp).all():
                raise ResponseError(
                    "a sampled token has no exact logprob", where=where,
                    hint="importance ratios need the exact value",
                )  # fmt: skip
            if rollout.finish_reason == "stop" and stops and rollout.completion_ids[-1] not in stops:
                raise ResponseError(
                    "the server ended a completion at a token that is no stop token of the student", where=where,
                    got=int(rollout.completion_ids[-1]), expected=f"one of {list(stops)}",
                    hint="does its generation_config name other eos ids?",
                )  # fmt: skip
        if full and not all(rollout.version for rollout in rollouts):
            confirmed = await self.destination.weights()
            if confirmed != expected:
                raise SyncError(
                    "the server does not confirm which weights it sampled from", where=where, got=repr(confirmed),
                    expected=repr(expected), hint="its replies name no version, so it was asked after sampling",
                )  # fmt: skip

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Let sampling and pushes run only in turn, unless the server can hold both versions."""
        if self.destination.publish_while_sampling:
            yield
        else:
            async with self._turn:
                yield

    def _drop_all_but(self, keep: int) -> None:
        while len(self._pushed) > keep:
            shutil.rmtree(self._pushed.pop(0), ignore_errors=True)
