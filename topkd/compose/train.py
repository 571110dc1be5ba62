"""``train``: a student, its prompts and its teachers, wired from one config."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import topkd
from topkd.clients import connect
from topkd.compose.config import RunConfig, saved
from topkd.compose.live_cache import LiveCache
from topkd.compose.progress import Progress
from topkd.compose.prompts import read_prompts
from topkd.engine import EngineConfig
from topkd.engine.data import PromptRow
from topkd.engine.loop import Source
from topkd.engine.metrics import MetricsLog, read_metrics
from topkd.topk.errors import ConfigError, DataError
from topkd.topk.protocols import Sampler, TeacherScorer


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where a finished run lies, and its records."""

    out: Path
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a config names on this machine, loaded."""

    tokenizer: Any
    student: Any
    rows: list[PromptRow]


def load_pieces(config: RunConfig, progress: Progress) -> Pieces:
    """Tokenizer, student and prompts of a config."""
    from topkd.engine.student import Student, load_tokenizer

    tokenizer = load_tokenizer(config.student.model)
    student = Student.load(config.student.model, config.student.device, config.student.dtype)
    rows, dropped = read_prompts(
        Path(config.data.path),
        tokenizer,
        max_tokens=config.rollout.max_prompt_tokens,
        overlong=config.rollout.overlong,
        limit=config.data.limit,
    )
    for row in rows:
        if (top := int(row.prompt_ids.max())) >= student.vocab_size:
            raise DataError(
                "a prompt holds an id that the student does not have", where=f"{config.data.path}, {row.sample_id}",
                got=top, expected=f"below {student.vocab_size}", hint="was the file made with another tokenizer?",
            )  # fmt: skip
    if dropped:
        progress.note(f"{dropped} prompts longer than {config.rollout.max_prompt_tokens} tokens were dropped")
    return Pieces(tokenizer, student, rows)


async def train(config: RunConfig, out: Path, progress: Progress | None = None) -> RunResult:
    """Run one config to its end; checkpoint, metrics and provenance lie in ``out`` afterwards.

    With ``[cache]`` every score and rollout is kept there, nothing that is there is asked again, and ``replay`` can
    repeat the run without a server.
    """
    progress = progress or Progress()
    fresh_folder(out)
    saved(config, out / "config.json")
    pieces = load_pieces(config, progress)
    async with contextlib.AsyncExitStack() as stack:
        cache = stack.enter_context(LiveCache(config.cache)) if config.cache is not None else None
        teachers: dict[str, TeacherScorer] = {}
        for name, teacher in config.teacher_map().items():
            progress.note(f"asking the teacher at {teacher.url}")
            client = await connect(
                teacher.url,
                dialect=teacher.dialect,
                model=teacher.model,
                api_key=teacher.api_key(),
                config=config.client,
            )
            teachers[name] = await stack.enter_async_context(client)
            if cache is not None:
                teachers[name] = cache.scorer(name, client, await client.model_name(), teacher.revision)
        return await run(
            config,
            student=pieces.student,
            tokenizer=pieces.tokenizer,
            rows=pieces.rows,
            teachers=teachers,
            out=out,
            progress=progress,
            wrap=None if cache is None else cache.recorder(config, pieces.student, pieces.rows),
            account=None if cache is None else cache.account,
        )


async def run(
    config: EngineConfig,
    *,
    student: Any,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    teachers: Mapping[str, TeacherScorer],
    out: Path,
    progress: Progress,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    wrap: Callable[[Sampler], Sampler] | None = None,
    source: Source | None = None,
    account: Callable[[], dict[str, Any]] | None = None,
) -> RunResult:
    """The engine's loop over ready pieces, with its diary, provenance and final checkpoint in ``out``.

    ``wrap`` puts something around (or in place of) the in-process sampler, ``source`` gives the rollouts instead of any
    sampler, and ``account`` tells what the diary should end with.
    """
    from topkd.engine.checkpoint import save_student
    from topkd.engine.learner import Learner
    from topkd.engine.loop import distil
    from topkd.engine.sampler import InProcessSampler

    stops = [tokenizer.eos_token_id] if tokenizer is not None and tokenizer.eos_token_id is not None else []
    sampler = InProcessSampler(student, stop_ids=stops, batch_size=config.rollout.batch_size)
    learner = Learner(student, config.learner, config.objective, lock=sampler.lock)
    evals: list[dict[str, Any]] = []

    def on_record(kind: str, record: dict[str, Any]) -> None:
        if kind == "eval":
            evals.append(record)
        progress.record(kind, record)

    def set_version(version: str) -> None:
        sampler.version = version

    def checkpoint(*, stopped: bool) -> dict[str, Any]:
        return {"version": learner.version, "objective": config.objective.model_dump(), "stopped": stopped}

    progress.stage("distil", config.steps)
    with MetricsLog(out / "metrics.jsonl") as log:
        log.write("event", {"event": "start", **provenance(student)})
        try:
            steps = await distil(
                config,
                rows=rows,
                sampler=sampler if wrap is None else wrap(sampler),
                teachers=teachers,
                learner=learner,
                log=log,
                evaluate=evaluate,
                on_record=on_record,
                set_version=set_version,
                source=source,
            )
        except BaseException as error:  # an interrupt, a dead teacher: what was learnt is kept, and the diary says why
            log.write("event", {"event": "stopped", "version": learner.version, "reason": type(error).__name__})
            if learner.version:
                with learner.lock:
                    save_student(student, tokenizer, out / "student", checkpoint(stopped=True))
                progress.note(
                    f"stopped after step {learner.version} of {config.steps}; the student so far: {out / 'student'}"
                )
            raise
        if account is not None:
            log.write("event", account())
    save_student(student, tokenizer, out / "student", checkpoint(stopped=False))
    return RunResult(out, steps, evals)


def fresh_folder(out: Path) -> None:
    """Make ``out``; a folder that already holds a run is refused, so that two runs never share a diary.

    A run that ended before its first step (a mistake found late) makes room for the next.
    """
    diary = out / "metrics.jsonl"
    if diary.exists() and diary.stat().st_size and not read_metrics(diary, "step"):
        diary.unlink()
    if diary.exists():
        raise ConfigError("the output folder already holds a run", where=str(out), hint="choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("cannot make the output folder", where=str(out), got=error.strerror) from error


def provenance(student: Any) -> dict[str, Any]:
    """What ran: versions, device, and the git revision when topkd itself runs from a checkout."""
    versions = {}
    for name in ("torch", "transformers", "numpy", "httpx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "topkd": topkd.__version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(student.device),
        "packages": versions,
    }


def _revision() -> str | None:
    root = Path(topkd.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments, our own checkout
            ["git", "-C", str(root), "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
