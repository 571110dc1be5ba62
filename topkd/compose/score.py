"""``score``: score the rows of a data file into a cache; rows already in it cost nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping

from topkd.compose.bulk.config import ScoreConfig, ScoreReport
from topkd.compose.bulk.job import SpendingLimit, load_text_tokenizer, open_existing_store, sum_counters
from topkd.compose.bulk.score_job import ScoreJob, Selection, build_queues, digest_sequence, open_job_teacher
from topkd.compose.cache.identity import build_served_identity
from topkd.compose.data.sequences import BadRow, check_source
from topkd.compose.progress import Progress
from topkd.offline import ScoreStore, TeacherIdentity

__all__ = ["ScoreConfig", "ScoreReport", "score"]


async def score(config: ScoreConfig, progress: Progress | None = None) -> ScoreReport:
    """Score every row of ``config.data`` into ``config.out``; a second call continues where the first one stopped.

    Raises:
        ConfigError, DataError: Before any request is sent.
        ServerError: A request failed in a way in which every row would fail. Scores stored before it are kept.
    """
    progress = progress or Progress()
    check_source(config.data)
    began = time.monotonic()
    if config.estimate:
        report = await _estimate(config)
    elif config.runner == "ray":
        from topkd.compose.bulk.ray_runner import score_on_ray

        report = await score_on_ray(config, progress)
    else:
        report = await _score_here(config, progress)
    if config.price_per_million is not None:
        report.cost = report.tokens_sent * config.price_per_million / 1e6
    report.seconds = time.monotonic() - began
    return report


async def _score_here(config: ScoreConfig, progress: Progress) -> ScoreReport:
    selection = Selection(config, load_text_tokenizer(config.tokenizer))
    report = ScoreReport(str(config.out), k=config.k)
    async with contextlib.AsyncExitStack() as stack:
        teachers = {name: await stack.enter_async_context(open_job_teacher(config, address))
                    for name, address in config.addresses().items()}  # fmt: skip
        report.teacher = ", ".join(dict.fromkeys(teacher.name for teacher in teachers.values()))
        store = stack.enter_context(ScoreStore(config.out, mode="a", codec=config.codec))
        queues, budget = build_queues(config, teachers, store), SpendingLimit(config.caps())
        job = ScoreJob(config, report=report, progress=progress, store=store, queues=queues, budget=budget)
        try:
            await job.score(selection)
        except asyncio.CancelledError:
            rows = sum(queue.live.replies for queue in queues.values())
            progress.note(
                f"stopped: {rows} rows scored and kept in {config.out}; run the same command again to continue"
            )
            raise
        finally:
            job.complete_report()
            report.client = sum_counters(teacher.metrics() for teacher in teachers.values())
    return report


async def _estimate(config: ScoreConfig) -> ScoreReport:
    """Estimate what a job would send, from the data and the cache alone."""
    selection = Selection(config, load_text_tokenizer(config.tokenizer))
    report = ScoreReport(str(config.out), teacher=config.model or "", k=config.k, estimate=True)
    with open_existing_store(config.out) as store:
        identities = {}
        if store is not None:
            names = await _find_model_names(config)
            report.teacher = ", ".join(dict.fromkeys(names.values()))
            identities = {name: build_served_identity(store, names[name], address.revision)
                          for name, address in config.addresses().items()}  # fmt: skip
        await asyncio.to_thread(_count, selection, report, store, identities)
    return report


async def _find_model_names(config: ScoreConfig) -> dict[str, str]:
    """Return the servers' model names, under which the cache stores scores; asking a server for its name is free."""
    names = {}
    for name, address in config.addresses().items():
        if address.model is not None:
            names[name] = address.model
            continue
        async with open_job_teacher(config, address) as teacher:
            names[name] = teacher.name
    return names


def _count(
    selection: Selection,
    report: ScoreReport,
    store: ScoreStore | None,
    identities: Mapping[str, TeacherIdentity],
) -> None:
    config, counted = selection.config, set[bytes]()
    for item in selection:
        report.rows += 1
        if isinstance(item, BadRow):
            if config.strict:
                raise item.reason
            report.refused += 1
            report.add_failure(item.number, item.reason)
            continue
        size, digest = int(item.ids.size), digest_sequence(item)
        report.positions += size - 1 - item.start
        report.largest_id = max(report.largest_id, int(item.ids.max(initial=0)))
        is_cached = store is not None and store.covers(
            identities[item.teacher_id], item.ids, item.start, config.k, read=True
        )
        if is_cached or digest in counted:
            report.cached += 1
            report.saved_tokens += size + 1
        else:
            report.scored += 1
            report.tokens_sent += size + 1
        counted.add(digest)
    report.duplicates, report.skipped = selection.duplicates, selection.skipped
    report.unbounded = selection.unbounded
