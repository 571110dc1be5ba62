"""``sample``: sample completions of a teacher, with their logprobs, into a cache."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from topkd.clients import OpenAIChat
from topkd.clients.connection import open_client
from topkd.clients.dialects.records import DIALECTS, find_dialect
from topkd.compose.bulk.config import SampleConfig, SampleReport
from topkd.compose.bulk.job import (
    CHUNK,
    GIVE_UP_AFTER,
    BulkJob,
    SpendingLimit,
    load_text_tokenizer,
    open_existing_store,
)
from topkd.compose.cache.identity import build_sampled_policy, build_served_identity
from topkd.compose.data.files import check_has_rows, count_rows, iter_raw_rows, parse_json_object
from topkd.compose.data.rows import check_row, tokenize_prompt
from topkd.compose.data.sequences import BadRow
from topkd.compose.progress import Progress
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.topk.errors import ConfigError, DataError, ResponseError, UnsupportedError
from topkd.topk.protocols import Sampler
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Int32

UNREADABLE = "no draw could be read back as token ids"  # the client's error for a request


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row: the prompt's ids for the student and for the teacher, and the messages if it is a conversation."""

    number: int
    ids: Int32
    teacher_ids: Int32
    messages: list[dict[str, Any]] | None
    params: SamplingParams

    @property
    def name(self) -> tuple[bytes, int | None]:
        """Return a key that is equal for equal requests."""
        return self.ids.tobytes(), self.params.seed


PromptItem: TypeAlias = Prompt | BadRow


async def sample(config: SampleConfig, progress: Progress | None = None) -> SampleReport:
    """Sample ``config.n`` completions of every prompt; a second call continues where the first one stopped.

    Raises:
        ConfigError, DataError: Before any request is sent.
        ServerError: A request failed in a way in which every row would fail. Completions stored before it are kept.
    """
    progress = progress or Progress()
    check_has_rows(config.data)
    tokenizer = load_text_tokenizer(config.tokenizer)
    report = SampleReport(str(config.out), k=config.k, estimate=config.estimate)
    began = time.monotonic()
    if config.estimate:
        await _estimate(config, tokenizer, report)
    else:
        client = await _open_client(config)
        config = config.model_copy(update={"dialect": client.dialect})
        async with client:
            report.teacher = await client.model_name()
            with ScoreStore(config.out, mode="a", codec=config.codec) as store:
                job = SampleJob(config, client, store=store, report=report, progress=progress)
                try:
                    await job.sample(_iter_prompts(config, tokenizer))
                except asyncio.CancelledError:
                    progress.note(
                        f"stopped: {report.completions} completions sampled and kept in {config.out}; "
                        "run the same command again to continue"
                    )
                    raise
                finally:
                    job.complete_report()
    report.cost = config.cost(report.prompt_tokens, report.completion_tokens)
    report.seconds = time.monotonic() - began
    return report


async def _open_client(config: SampleConfig) -> Any:
    """Open a client with the dialect that samples best on this server."""
    chats = config.dialect in DIALECTS and DIALECTS[config.dialect].chats
    options = {"tokenizer": config.tokenizer} if chats else {}
    client = await open_client(
        config.teacher, dialect=config.dialect, model=config.model, api_key=config.api_key, config=config.client,
        **options,
    )  # fmt: skip
    # Open another client: chat needs the tokenizer, and vLLM's completions add the sampled token to the K listed ones.
    better = find_dialect(client.dialect).samples_best_as
    if config.dialect != "auto" or not better:
        return client
    await client.aclose()
    return await _open_client(config.model_copy(update={"dialect": better}))


class SampleJob(BulkJob[tuple[PromptItem, bool], Prompt, list[Rollout]]):
    """Samples completions of the prompts, within the spending limit, and stores every reply.

    Args:
        config: Settings of the job.
        client: A client that samples, or that chats.
        store: A store that is open for appending.
        report: The report to fill in.
        progress: Shows the counts.
    """

    stage = "sample"

    def __init__(
        self, config: SampleConfig, client: Any, *, store: ScoreStore, report: SampleReport, progress: Progress
    ) -> None:
        if not isinstance(client, OpenAIChat | Sampler):
            raise UnsupportedError("this server cannot sample", where=client.where(), got=f"dialect {client.dialect}")
        super().__init__(report, progress, store, in_flight=config.in_flight, strict=config.strict)
        self.config, self.client, self.report = config, client, report
        self.teacher = build_served_identity(store, report.teacher, config.revision)
        self.policy = build_sampled_policy(self.teacher)
        self.limit = SpendingLimit(config.caps())
        self.names_in_flight: set[tuple[bytes, int | None]] = set()
        # Prompts with unreadable replies. As long as no reply could be read, the tokenizer is probably wrong.
        self.unreadable: list[Prompt] = []

    async def sample(self, prompts: Iterator[PromptItem]) -> None:
        """Sample completions of the prompts."""
        self.prompts = prompts
        await self.run(min(await asyncio.to_thread(count_rows, self.config.data), self.config.limit or 1 << 62))

    def read_chunk(self) -> list[tuple[PromptItem, bool]]:
        """Read the next prompts; add to each whether the cache has its completions."""
        return [(prompt, isinstance(prompt, Prompt) and self._is_cached(prompt))
                for prompt in islice(self.prompts, CHUNK)]  # fmt: skip

    async def start_chunk(self, chunk: Sequence[tuple[PromptItem, bool]]) -> bool:
        """Start the requests that fit into the spending limit."""
        for prompt, is_cached in chunk:
            if isinstance(prompt, BadRow):
                self.failures.refuse(prompt.number, prompt.reason)
            # An equal prompt may have been answered since the chunk was read.
            elif is_cached or prompt.name in self.names_in_flight or await asyncio.to_thread(self._is_cached, prompt):
                self.report.cached += 1
            elif isinstance(self.client, OpenAIChat) and prompt.messages is None:
                self.failures.refuse(prompt.number, DataError(
                    "chat completions need messages", where=f"{self.config.data}:{prompt.number}",
                    got="a prompt of text or ids", hint="give messages, or use a server that accepts token ids",
                ))  # fmt: skip
            elif await self._reserve(prompt):
                self.names_in_flight.add(prompt.name)
                self.start(prompt)
            else:
                self.report.stopped = self.limit.reached
                return False
            self.report.rows += 1
            self.show()
        return True

    async def _reserve(self, prompt: Prompt) -> bool:
        """Wait for a slot, and reserve the most tokens that a prompt can use; return False if a cap forbids them."""
        await self.wait_for_slot()
        while not self.limit.take(prompt.teacher_ids.size, self.config.n * self.config.max_new_tokens):
            if not self.in_flight:
                return False
            self.slot_freed.clear()  # a request in flight may give tokens back
            await self.slot_freed.wait()
        return True

    async def ask(self, row: Prompt) -> list[Rollout]:
        """Sample the completions of a prompt; return none if no completion could be read."""
        config = self.config
        if not isinstance(self.client, OpenAIChat):
            rollouts: list[Rollout] = await self.client.sample(row.teacher_ids, config.n, row.params, k=config.k)
            return rollouts
        try:
            return await self.client.chat(
                row.messages or [], config.n, row.params, prompt_ids=row.teacher_ids, k=config.k
            )
        except ResponseError as error:
            if error.what != UNREADABLE:
                raise
            return []  # stored as a request without completions: a second one would sample the same

    async def record(self, row: Prompt, reply: list[Rollout]) -> None:
        """Store the completions, and give unused tokens back to the spending limit."""
        config, report = self.config, self.report
        if not reply and not report.completions:
            self.unreadable.append(row)
            if len(self.unreadable) >= GIVE_UP_AFTER:
                raise ResponseError(UNREADABLE, where=config.teacher, got=f"{len(self.unreadable)} replies in a row",
                                    hint="is --tokenizer the served model's?")  # fmt: skip
        else:
            for prompt in self.unreadable:
                await asyncio.to_thread(self._store, prompt, [])
            self.unreadable.clear()
            await asyncio.to_thread(self._store, row, reply)
        dropped = config.n - len(reply)
        used = sum(int(rollout.completion_ids.size) for rollout in reply) + dropped * config.max_new_tokens
        report.sampled += 1
        report.completions += len(reply)
        report.ambiguous_completions += dropped
        report.prompt_tokens += int(row.teacher_ids.size)
        report.completion_tokens += used
        self.limit.give_back(config.n * config.max_new_tokens - used)

    def finish(self, row: Prompt) -> None:
        """Remove a prompt from the requests in flight."""
        self.names_in_flight.discard(row.name)

    def count_progress(self) -> tuple[int, int]:
        """Count the finished prompts and the sampled tokens."""
        report = self.report
        return report.sampled + report.cached + report.refused + report.failed, report.completion_tokens

    def _is_cached(self, prompt: Prompt) -> bool:
        return has_completions(prompt, self.store, self.teacher, self.config.k)

    def _store(self, prompt: Prompt, rollouts: list[Rollout]) -> None:
        for rollout in rollouts:
            if rollout.topk is not None and rollout.completion_ids.size:
                ids = np.concatenate([prompt.teacher_ids, rollout.completion_ids])
                self.store.put(self.teacher, ids, rollout.topk, asked=self.config.k)
        # The top-K lists are stored as scores above. The rollout gets the student's prompt.
        bare = [replace(rollout, prompt_ids=prompt.ids, topk=None, sampling=prompt.params) for rollout in rollouts
                if rollout.completion_ids.size]  # fmt: skip
        self.store.put_rollouts(self.policy, prompt.ids, bare, prompt.params)

    def complete_report(self) -> None:
        """Add the client's counters. If no reply at all could be read, count each as a failure."""
        for prompt in self.unreadable:
            self.report.sampled -= 1
            self.report.failed += 1
            self.report.add_failure(prompt.number, ResponseError(
                UNREADABLE, where=f"{self.config.data}:{prompt.number}", hint="is --tokenizer the served model's?",
            ))  # fmt: skip
        counters: dict[str, float] = getattr(self.client, "metrics", {})
        self.report.client = dict(counters)
        for name in ("ambiguous_entries", "listed_entries"):
            setattr(self.report, name, int(self.report.client.get(name, 0)))


def has_completions(prompt: Prompt, store: ScoreStore, teacher: TeacherIdentity, k: int) -> bool:
    """Return whether a cache has the completions of a prompt, with top-K lists of at least k entries."""
    rollouts = store.get_rollouts(build_sampled_policy(teacher), prompt.ids, None, prompt.params)
    if rollouts is None:
        return False
    start = prompt.teacher_ids.size - 1
    sequences = (np.concatenate([prompt.teacher_ids, rollout.completion_ids]) for rollout in rollouts)
    return not k or all(store.covers(teacher, ids, start, k, read=True) for ids in sequences)


def _iter_prompts(config: SampleConfig, tokenizer: Any) -> Iterator[PromptItem]:
    for number, raw in islice(iter_raw_rows(config.data), config.limit):
        where = f"{config.data}:{number}"
        try:
            yield _build_prompt(config, number, check_row(parse_json_object(raw, where), where), tokenizer, where)
        except DataError as error:
            yield BadRow(number, error)


def _build_prompt(config: SampleConfig, number: int, row: Any, tokenizer: Any, where: str) -> Prompt:
    if tokenizer is None and (row.prompt_ids is None or row.hint is not None):
        what = "rows of text" if row.prompt_ids is None else "rows with a hint"
        raise ConfigError(f"{what} need the served model's tokenizer", where=where, hint="give --tokenizer PATH")
    if row.messages is not None and (not row.messages or row.messages[-1].get("role") == "assistant"):
        raise DataError("the messages must end with a message that the teacher answers", where=where)
    ids = np.array(tokenize_prompt(row, tokenizer, {}, where), np.int32)
    teacher_ids = ids
    if row.hint is not None:
        if config.dialect in DIALECTS and DIALECTS[config.dialect].chats:
            raise DataError("a hint needs a server that accepts ids", where=where, hint="write it into the messages")
        teacher_ids = np.array(tokenize_prompt(row, tokenizer, {"hint": row.hint}, where), np.int32)
    # Prompts with equal ids, n, K and seed are one request, wherever they stand in the file.
    digest = hashlib.blake2b(
        f"{config.seed} {config.n} {config.k}".encode() + teacher_ids.tobytes(), digest_size=4
    ).digest()
    params = SamplingParams(max_tokens=config.max_new_tokens, seed=int.from_bytes(digest, "big") >> 1)
    return Prompt(number, ids, teacher_ids, row.messages, params)


async def _estimate(config: SampleConfig, tokenizer: Any, report: SampleReport) -> None:
    """Estimate the most that a job would sample, from the data and the cache alone."""
    with open_existing_store(config.out) as store:
        cached_by = None
        if store is not None:
            report.teacher = config.model or ""
            if config.model is None:  # completions are stored under it; asking for it is free
                async with await _open_client(config) as client:
                    report.teacher = await client.model_name()
            cached_by = store, build_served_identity(store, report.teacher, config.revision)
        await asyncio.to_thread(_count, config, tokenizer, report, cached_by)


def _count(
    config: SampleConfig, tokenizer: Any, report: SampleReport, cached_by: tuple[ScoreStore, TeacherIdentity] | None
) -> None:
    counted: set[bytes] = set()
    for prompt in _iter_prompts(config, tokenizer):
        report.rows += 1
        if isinstance(prompt, BadRow):
            report.refused += 1
            report.add_failure(prompt.number, prompt.reason)
        elif prompt.teacher_ids.tobytes() in counted or (
            cached_by is not None and has_completions(prompt, *cached_by, config.k)
        ):
            report.cached += 1
        else:
            counted.add(prompt.teacher_ids.tobytes())
            report.sampled += 1
            report.prompt_tokens += int(prompt.teacher_ids.size)
            report.completion_tokens += config.n * config.max_new_tokens
