"""``score``: a whole data file through a teacher into the cache; what is there already costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping

from topkd.compose.bulk.job import BulkJob, build_queues, load_text_tokenizer, open_job_teacher, sum_counters
from topkd.compose.bulk.score_config import ScoreConfig, ScoreReport
from topkd.compose.bulk.selection import Selection, SpendingLimit, digest_of
from topkd.compose.cache.identity import build_served_identity
from topkd.compose.data.sequences import BadRow, check_source
from topkd.compose.progress import Progress
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.store.folder import FORMAT_FILE

__all__ = ["ScoreConfig", "ScoreReport", "score"]


async def score(config: ScoreConfig, progress: Progress | None = None) -> ScoreReport:
    """Score every row of ``config.data`` into ``config.out``; run it again to go on where it stopped.

    Raises:
        ConfigError, DataError: before anything is asked.
        ServerError: one that every row would meet; what was scored until then is kept.
    """
    progress = progress or Progress()
    check_source(config.data)
    selection = Selection(config, load_text_tokenizer(config.tokenizer))
    if config.estimate:
        return await _estimate(config, selection)
    began = time.monotonic()
    if config.runner == "ray":
        from topkd.compose.bulk.ray_runner import score_on_ray

        report = await score_on_ray(config, progress)
    else:
        report = await _score_here(config, selection, progress)
    if config.price_per_million is not None:
        report.cost = report.tokens_sent * config.price_per_million / 1e6
    report.seconds = time.monotonic() - began
    return report


async def _score_here(config: ScoreConfig, selection: Selection, progress: Progress) -> ScoreReport:
    report = ScoreReport(str(config.out), k=config.k)
    async with contextlib.AsyncExitStack() as stack:
        teachers = {name: await stack.enter_async_context(open_job_teacher(config, asked))
                    for name, asked in config.asked().items()}  # fmt: skip
        report.teacher = ", ".join(dict.fromkeys(teacher.name for teacher in teachers.values()))
        with ScoreStore(config.out, mode="a", codec=config.codec) as store:
            lanes = build_queues(config, teachers, store)
            job = BulkJob(
                config, report=report, progress=progress, store=store, lanes=lanes, permits=SpendingLimit(config)
            )
            try:
                await job.run(selection)
            except asyncio.CancelledError:
                done = sum(lane.live.answered for lane in lanes.values())
                progress.note(
                    f"stopped: {done} rows scored and kept in {config.out}; "
                    "run the same command again to go on from there"
                )
                raise
            finally:
                job.account()
                report.client = sum_counters(teacher.metrics() for teacher in teachers.values())
    return report


async def _estimate(config: ScoreConfig, selection: Selection) -> ScoreReport:
    """What a run would send, from the data and the cache alone."""
    began = time.monotonic()
    report = ScoreReport(str(config.out), teacher=config.model or "", k=config.k, estimate=True)
    if not (config.out / FORMAT_FILE).exists():
        await asyncio.to_thread(_count, config, selection, report, None, {})
    else:
        names = {}
        for name, asked in config.asked().items():
            if asked.model is not None:
                names[name] = asked.model
                continue
            async with open_job_teacher(
                config, asked
            ) as teacher:  # which scores count depends on it; asking for it is free
                names[name] = teacher.name
        report.teacher = ", ".join(dict.fromkeys(names.values()))
        with ScoreStore(config.out) as store:
            who = {name: build_served_identity(store, names[name], asked.revision)
                   for name, asked in config.asked().items()}  # fmt: skip
            await asyncio.to_thread(_count, config, selection, report, store, who)
    if config.price_per_million is not None:
        report.cost = report.tokens_sent * config.price_per_million / 1e6
    report.seconds = time.monotonic() - began
    return report


def _count(
    config: ScoreConfig,
    selection: Selection,
    report: ScoreReport,
    store: ScoreStore | None,
    who: Mapping[str, TeacherIdentity],
) -> None:
    seen: set[bytes] = set()
    for item in selection:
        report.rows += 1
        if isinstance(item, BadRow):
            if config.strict:
                raise item.reason
            report.refused += 1
            report.blame(item.number, item.reason)
            continue
        size, digest = int(item.ids.size), digest_of(item)
        report.positions += size - 1 - item.start
        report.largest_id = max(report.largest_id, int(item.ids.max(initial=0)))
        held = store is not None and store.covers(who[item.teacher_id], item.ids, item.start, config.k, read=True)
        if held or digest in seen:
            report.cached += 1
            report.saved_tokens += size + 1
        else:
            report.scored += 1
            report.tokens_sent += size + 1
        seen.add(digest)
    report.duplicates, report.skipped = selection.duplicates, selection.skipped
    report.unbounded = selection.unbounded
