"""``sample``: a teacher's own completions, with the logprobs it drew them with, into the cache."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from topkd.clients import OpenAIChat
from topkd.clients.connection import open_client
from topkd.clients.dialects.records import DIALECTS, find_dialect
from topkd.compose.bulk.job import load_text_tokenizer
from topkd.compose.bulk.report import GIVE_UP_AFTER, JOB_TROUBLE, ROW_TROUBLE, Troubles, committing
from topkd.compose.bulk.sample_config import SampleConfig, SampleReport, SamplingBudget
from topkd.compose.cache.identity import build_sampled_policy, build_served_identity
from topkd.compose.data.files import check_has_rows, count_rows, iter_raw_rows, parse_json_object
from topkd.compose.data.rows import check_row, tokenize_prompt
from topkd.compose.progress import Progress
from topkd.engine.loop.waiting import root_exception
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.store.folder import FORMAT_FILE
from topkd.topk.errors import ConfigError, DataError, ResponseError, UnsupportedError
from topkd.topk.protocols import Sampler
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Int32

UNREADABLE = "no draw could be read back as token ids"  # of every draw of a request


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row: as the student sees it, as the teacher does, and the messages where it is a conversation."""

    number: int
    ids: Int32
    teacher_ids: Int32
    messages: list[dict[str, Any]] | None
    params: SamplingParams

    @property
    def name(self) -> tuple[bytes, int | None]:
        """Equal for equal requests."""
        return self.ids.tobytes(), self.params.seed


async def sample(config: SampleConfig, progress: Progress | None = None) -> SampleReport:
    """Draw ``config.n`` completions for every prompt; run it again to go on where it stopped.

    Raises:
        ConfigError, DataError: before anything is asked.
        ServerError: one that every row would meet; what was drawn until then is kept.
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
                    total = min(await asyncio.to_thread(count_rows, config.data), config.limit or 1 << 62)
                    await job.run(_iter_prompts(config, tokenizer), total)
                except asyncio.CancelledError:
                    progress.note(
                        f"stopped: {report.completions} completions drawn and kept in {config.out}; "
                        "run the same command again to go on from there"
                    )
                    raise
                finally:
                    job.account()
    report.cost = config.cost(report.prompt_tokens, report.completion_tokens)
    report.seconds = time.monotonic() - began
    return report


async def _open_client(config: SampleConfig) -> Any:
    """A client of the dialect that samples best there."""
    table = {"tokenizer": config.tokenizer} if config.dialect in DIALECTS and DIALECTS[config.dialect].chats else {}
    client = await open_client(
        config.teacher, dialect=config.dialect, model=config.model, api_key=config.api_key, config=config.client,
        **table,
    )  # fmt: skip
    # Chat needs the tokenizer's table, and vLLM's completions list the sampled token beside the K, not as one of them.
    better = find_dialect(client.dialect).samples_best_as
    if config.dialect != "auto" or not better:
        return client
    await client.aclose()
    return await _open_client(config.model_copy(update={"dialect": better}))


class SampleJob:
    """Keeps a bounded number of requests in flight, never sets out beyond the purse, and writes down every answer."""

    def __init__(
        self, config: SampleConfig, client: Any, *, store: ScoreStore, report: SampleReport, progress: Progress
    ) -> None:
        if not isinstance(client, OpenAIChat | Sampler):
            raise UnsupportedError("this server cannot sample", where=client.where(), got=f"dialect {client.dialect}")
        self.config, self.client, self.store, self.report, self.progress = config, client, store, report, progress
        self.teacher = build_served_identity(store, report.teacher, config.revision)
        self.policy = build_sampled_policy(self.teacher)
        self.purse = SamplingBudget(config)
        self.room = asyncio.Semaphore(config.in_flight)
        self.settled = asyncio.Event()
        self.under_way: set[tuple[bytes, int | None]] = set()
        self.troubles = Troubles(report, strict=config.strict)
        self.unread: list[Prompt] = []  # until an answer was read, a wrong tokenizer is likelier than bad luck
        self.began = time.monotonic()

    async def run(self, prompts: Iterator[Prompt | tuple[int, DataError]], total: int) -> None:
        """To the end of the data, or to a cap."""
        self.progress.stage("sample", total)
        try:
            async with asyncio.TaskGroup() as group:
                saving = group.create_task(
                    committing(self.store)
                )  # one that fails ends the job: its work would be lost
                await self._all(prompts)
                saving.cancel()
        except BaseExceptionGroup as errors:
            raise root_exception(errors) from errors

    async def _all(self, prompts: Iterator[Prompt | tuple[int, DataError]]) -> None:
        async with asyncio.TaskGroup() as group:
            while chunk := await asyncio.to_thread(lambda: list(islice(prompts, 64))):
                for prompt in chunk:
                    if not await self._begin(prompt, group):
                        return

    async def _begin(self, prompt: Prompt | tuple[int, DataError], group: asyncio.TaskGroup) -> bool:
        """Set out for a prompt as soon as there is room; False when the purse is empty for good."""
        report = self.report
        if isinstance(prompt, tuple):
            self.troubles.refuse(*prompt)
        elif prompt.name in self.under_way or is_kept(prompt, self.store, self.teacher, self.config.k):
            report.cached += 1
        elif isinstance(self.client, OpenAIChat) and prompt.messages is None:
            where = f"{self.config.data}:{prompt.number}"
            self.troubles.refuse(prompt.number, DataError(
                "chat completions take messages", where=where, got="a prompt of text or ids",
                hint="give messages, or a server that continues ids",
            ))  # fmt: skip
        else:
            await self.room.acquire()
            while not self.purse.take(prompt.teacher_ids.size, self.config.n * self.config.max_new_tokens):
                if not self.under_way:
                    report.stopped = self.purse.reached
                    return False
                self.settled.clear()  # what is under way may give something back
                await self.settled.wait()
            self.under_way.add(prompt.name)
            group.create_task(self._settle(prompt))
        report.rows += 1
        self._show()
        return True

    async def _settle(self, prompt: Prompt) -> None:
        try:
            await self._draw(prompt)
        finally:
            self.under_way.discard(prompt.name)
            self.room.release()
            self.settled.set()

    async def _draw(self, prompt: Prompt) -> None:
        config, report = self.config, self.report
        try:
            drawn = await self._ask(prompt)
        except JOB_TROUBLE:
            raise
        except ROW_TROUBLE as error:
            self.troubles.failed(prompt.number, error)
            return
        self.troubles.answered()
        if not drawn and not report.completions:
            self.unread.append(prompt)
            if len(self.unread) >= GIVE_UP_AFTER:
                raise ResponseError(UNREADABLE, where=self.config.teacher, got=f"{len(self.unread)} answers in a row",
                                    hint="is --tokenizer the served model's?")  # fmt: skip
        else:
            for waiting in self.unread:
                await asyncio.to_thread(self._keep, waiting, [])
            self.unread.clear()
            await asyncio.to_thread(self._keep, prompt, drawn)
        report.sampled += 1
        report.completions += len(drawn)
        report.ambiguous_completions += config.n - len(drawn)
        used = sum(int(rollout.completion_ids.size) for rollout in drawn)
        used += (config.n - len(drawn)) * config.max_new_tokens
        report.prompt_tokens += int(prompt.teacher_ids.size)
        report.completion_tokens += used
        self.purse.give_back(config.n * config.max_new_tokens - used)
        self._show()

    async def _ask(self, prompt: Prompt) -> list[Rollout]:
        config = self.config
        if not isinstance(self.client, OpenAIChat):
            rollouts: list[Rollout] = await self.client.sample(prompt.teacher_ids, config.n, prompt.params, k=config.k)
            return rollouts
        try:
            drawn = await self.client.chat(
                prompt.messages or [], config.n, prompt.params, prompt_ids=prompt.teacher_ids, k=config.k
            )
        except ResponseError as error:
            if error.what != UNREADABLE:
                raise
            return []  # kept as a request without an answer: asking it again would draw the same
        return drawn

    def _keep(self, prompt: Prompt, drawn: list[Rollout]) -> None:
        for rollout in drawn:
            if rollout.topk is not None and rollout.completion_ids.size:
                ids = np.concatenate([prompt.teacher_ids, rollout.completion_ids])
                self.store.put(self.teacher, ids, rollout.topk, asked=self.config.k)
        # The lists are the scores above; the rollout is what the student will have been given.
        bare = [replace(rollout, prompt_ids=prompt.ids, topk=None, sampling=prompt.params) for rollout in drawn
                if rollout.completion_ids.size]  # fmt: skip
        self.store.put_rollouts(self.policy, prompt.ids, bare, prompt.params)

    def account(self) -> None:
        """What the client counted; answers that could not be read, while none could, are no completions."""
        for prompt in self.unread:
            self.report.sampled -= 1
            self.report.failed += 1
            self.report.blame(prompt.number, ResponseError(UNREADABLE, where=f"{self.config.data}:{prompt.number}",
                                                           hint="is --tokenizer the served model's?"))  # fmt: skip
        counters: dict[str, float] = getattr(self.client, "metrics", {})
        self.report.client = dict(counters)
        for name in ("ambiguous_entries", "listed_entries"):
            setattr(self.report, name, int(self.report.client.get(name, 0)))

    def _show(self) -> None:
        report, seconds = self.report, max(time.monotonic() - self.began, 1e-9)
        detail = f"{report.completion_tokens / seconds:.0f} tok/s  {len(self.under_way)} in flight{report.setbacks()}"
        self.progress.advance(report.sampled + report.cached + report.refused + report.failed, detail)


def is_kept(prompt: Prompt, store: ScoreStore, teacher: TeacherIdentity, k: int) -> bool:
    """Whether a cache has the completions of a prompt, and the teacher's lists of at least k with them."""
    found = store.get_rollouts(build_sampled_policy(teacher), prompt.ids, None, prompt.params)
    if found is None:
        return False
    start = prompt.teacher_ids.size - 1
    sequences = (np.concatenate([prompt.teacher_ids, rollout.completion_ids]) for rollout in found)
    return not k or all(store.covers(teacher, ids, start, k, read=True) for ids in sequences)


def _iter_prompts(config: SampleConfig, tokenizer: Any) -> Iterator[Prompt | tuple[int, DataError]]:
    for number, raw in islice(iter_raw_rows(config.data), config.limit):
        where = f"{config.data}:{number}"
        try:
            yield _build_prompt(config, number, check_row(parse_json_object(raw, where), where), tokenizer, where)
        except DataError as error:
            yield number, error


def _build_prompt(config: SampleConfig, number: int, row: Any, tokenizer: Any, where: str) -> Prompt:
    if tokenizer is None and (row.prompt_ids is None or row.hint is not None):
        what = "rows of text" if row.prompt_ids is None else "rows with a hint"
        raise ConfigError(f"{what} need the served model's tokenizer", where=where, hint="give --tokenizer PATH")
    if row.messages is not None and (not row.messages or row.messages[-1].get("role") == "assistant"):
        raise DataError("the messages must end before the answer that is to be drawn", where=where)
    ids = np.array(tokenize_prompt(row, tokenizer, None, where), np.int32)
    seen = ids
    if row.hint is not None:
        if config.dialect in DIALECTS and DIALECTS[config.dialect].chats:
            raise DataError("a hint needs a server that continues ids", where=where, hint="write it into the messages")
        seen = np.array(tokenize_prompt(row, tokenizer, row.hint, where), np.int32)
    # One request for a prompt, an n and a K, whatever the file's order; another seed is another draw.
    named = hashlib.blake2b(f"{config.seed} {config.n} {config.k}".encode() + seen.tobytes(), digest_size=4).digest()
    params = SamplingParams(max_tokens=config.max_new_tokens, seed=int.from_bytes(named, "big") >> 1)
    return Prompt(number, ids, seen, row.messages, params)


async def _estimate(config: SampleConfig, tokenizer: Any, report: SampleReport) -> None:
    """What a run would sample at most, from the data and the cache alone."""
    if not (config.out / FORMAT_FILE).exists():
        await asyncio.to_thread(_count, config, tokenizer, report, lambda _: False)
        return
    report.teacher = config.model or ""
    if config.model is None:  # what of the cache counts depends on the name; asking for it is free
        async with await _open_client(config) as client:
            report.teacher = await client.model_name()
    with ScoreStore(config.out) as store:
        teacher = build_served_identity(store, report.teacher, config.revision)
        await asyncio.to_thread(
            _count, config, tokenizer, report, lambda prompt: is_kept(prompt, store, teacher, config.k)
        )


def _count(config: SampleConfig, tokenizer: Any, report: SampleReport, held: Callable[[Prompt], bool]) -> None:
    seen: set[bytes] = set()
    for prompt in _iter_prompts(config, tokenizer):
        report.rows += 1
        if isinstance(prompt, tuple):
            report.refused += 1
            report.blame(*prompt)
        elif prompt.teacher_ids.tobytes() in seen or held(prompt):
            report.cached += 1
        else:
            seen.add(prompt.teacher_ids.tobytes())
            report.sampled += 1
            report.prompt_tokens += int(prompt.teacher_ids.size)
            report.completion_tokens += config.n * config.max_new_tokens
