"""``score_data``: a whole data file through a teacher into the cache; what is there already costs nothing."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from topkd.compose.bulk import BulkJob
from topkd.compose.progress import Progress
from topkd.compose.score_config import ScoreConfig, ScoreReport
from topkd.compose.selection import Selection, digest_of
from topkd.compose.sequences import BadRow
from topkd.compose.teachers import open_teacher
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.folder import FORMAT_FILE
from topkd.topk.errors import ConfigError, DataError

__all__ = ["ScoreConfig", "ScoreReport", "score_data"]


async def score_data(config: ScoreConfig, progress: Progress | None = None) -> ScoreReport:
    """Score every row of ``config.data`` into ``config.out``; run it again to go on where it stopped.

    Raises:
        ConfigError, DataError: before anything is asked.
        ServerError: one that every row would meet; what was scored until then is kept.
    """
    progress = progress or Progress()
    if not config.data.exists():
        raise DataError("no such data", where=str(config.data))
    selection = Selection(config, _tokenizer(config.tokenizer))
    if config.estimate:
        return await _estimate(config, selection)
    began = time.monotonic()
    report = ScoreReport(str(config.out), k=config.k)
    async with _opened(config) as teacher:
        report.teacher = teacher.name
        identity = TeacherIdentity(teacher.name, revision=config.revision)
        with ScoreStore(config.out, mode="a", codec=config.codec) as store:
            job = BulkJob(config, report=report, progress=progress, store=store, identity=identity, teacher=teacher)
            try:
                await job.run(selection)
            except asyncio.CancelledError:
                progress.note(
                    f"stopped: {job.live.answered} rows scored and kept in {config.out}; "
                    "run the same command again to go on from there"
                )
                raise
            finally:
                job.account()
                report.client = teacher.metrics()
    report.seconds = time.monotonic() - began
    return report


async def _estimate(config: ScoreConfig, selection: Selection) -> ScoreReport:
    """What a run would send, from the data and the cache alone."""
    began = time.monotonic()
    report = ScoreReport(str(config.out), teacher=config.model or "", k=config.k, estimate=True)
    if not (config.out / FORMAT_FILE).exists():
        await asyncio.to_thread(_count, config, selection, report, None)
    else:
        if config.model is None:  # which of the cache's scores count depends on the name; asking for it is free
            async with _opened(config) as teacher:
                report.teacher = teacher.name
        with ScoreStore(config.out) as store:
            await asyncio.to_thread(_count, config, selection, report, store)
    if config.price_per_million is not None:
        report.cost = report.tokens_sent * config.price_per_million / 1e6
    report.seconds = time.monotonic() - began
    return report


def _count(config: ScoreConfig, selection: Selection, report: ScoreReport, store: ScoreStore | None) -> None:
    identity = TeacherIdentity(report.teacher or "unnamed", revision=config.revision)
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
        if digest in seen or (store is not None and store.covers(identity, item.ids, item.start, config.k)):
            report.cached += 1
            report.saved_tokens += size
        else:
            report.scored += 1
            report.tokens_sent += size + 1
        seen.add(digest)
    report.duplicates = selection.duplicates


def _opened(config: ScoreConfig) -> Any:
    return open_teacher(
        config.teachers, dialect=config.dialect, model=config.model, api_key=config.api_key, config=config.client
    )


def _tokenizer(path: str | None) -> Any:
    if path is None:
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError("a tokenizer needs transformers", hint='pip install "topkd[train]"') from error
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError("cannot load a tokenizer", where=path, got=str(error).splitlines()[0][:200]) from error
