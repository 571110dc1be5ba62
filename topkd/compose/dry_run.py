"""Dry run: check every part of a run without training, and list every problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from topkd.clients.probe.probe import probe
from topkd.compose.cache.contents import as_replayed, cache_folder
from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.digests import describe_rows
from topkd.compose.data.prompts import Prompts
from topkd.compose.preflight.forecast import Forecast, forecast
from topkd.compose.preflight.preflight import Preflight, collect_problems
from topkd.compose.preflight.teachers import TeacherInfo, select_teachers
from topkd.compose.progress import Progress
from topkd.compose.run.resume import PreviousRun, check_same_rows, preview_resume
from topkd.engine.loop.data_mixing import count_on_policy_prompts
from topkd.engine.loop.prompts import PromptRow
from topkd.topk.errors import TopkdError

# Settings that are listed only if the config sets them: only some teachers and some rows use them.
_LISTED_IF_SET = (".ema", ".hint", ".reference", ".feedback", ".revision")


@dataclass(frozen=True, slots=True)
class EndpointFinding:
    """A teacher's server and what a probe found out about it."""

    teacher: str
    url: str
    verdict: str
    can_teach: bool
    model: str = ""
    dialect: str = ""
    k: int | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row as the student or a teacher sees it: stretches of text, and whether their tokens are trained."""

    side: str
    tokens: int
    parts: list[tuple[str, bool]]


@dataclass(slots=True)
class DryRun:
    """Everything a dry run found.

    Attributes:
        settings: (key, value, whether the file or the command line sets it) for every setting that applies.
        problems: Errors that would end the run, one line each.
        notes: Remarks that are no errors.
        device: The student's device.
        endpoints: The teachers' servers.
        data: Counts and lengths of the rows.
        prompts: The first row, as the student and its teacher see it.
        forecast: Estimates; None when the model or the data could not be read.
    """

    settings: list[tuple[str, Any, bool]]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    device: str = ""
    endpoints: list[EndpointFinding] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    prompts: list[Rendered] = field(default_factory=list)
    forecast: Forecast | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the findings as plain values."""
        return {"ok": not self.problems, **asdict(self)}


class _Notes(Progress):
    def __init__(self, found: DryRun) -> None:
        self._found = found

    def note(self, text: str) -> None:
        if not text.startswith("asking the teacher"):
            self._found.notes.append(text)


async def dry_run(
    config: RunConfig,
    *,
    served: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    cache: Path | None = None,
) -> DryRun:
    """Make all checks of a run without training, and collect every problem.

    Args:
        config: Settings of the run.
        served: False for a replay, which needs no server.
        out: The run's folder, if it is known.
        resume: Whether the run would continue the one in ``out``.
        cache: Folder of a replay's cache; None uses the config's.
    """
    config = config if served else as_replayed(config)
    found = DryRun(_list_used_settings(config, served=served), config=config.model_dump(mode="json"))
    previous = _check_folder(found, config, out, command="train" if served else "replay", resume=resume)
    state = Preflight(config, _Notes(found), is_replay=not served, cache=cache)
    found.problems += await collect_problems(state)
    if served:
        await _probe_all(config, found, student=config.student.model if state.prompts is not None else None)
    _note_recorded(state, found)
    if state.prompts is None:
        return found
    prompts = state.prompts
    found.data, found.prompts = _describe_data(prompts), _render_first_row(prompts)
    if previous.checkpoint is not None:
        try:
            check_same_rows(previous.events, describe_rows(prompts.rows), where=str(out))
        except TopkdError as error:
            found.problems.append(str(error))
    _estimate(config, prompts, state.teachers, found)
    return found


def _check_folder(
    found: DryRun, config: RunConfig, out: str | Path | None, *, command: str, resume: bool
) -> PreviousRun:
    """Check the output folder as a run would; return the run that is in it."""
    if out is None:
        return PreviousRun()
    try:
        note, previous = preview_resume(Path(out), config, command=command, resume=resume)
    except TopkdError as error:
        found.problems.append(str(error))
        return PreviousRun()
    found.notes += filter(None, [note])
    return previous


def _note_recorded(state: Preflight, found: DryRun) -> None:
    """Note which completions and scores a replay takes from its cache."""
    if state.recorded is None:
        return
    config, recorded = state.config, state.recorded
    scorers = " and ".join(repr(teacher.name) for teacher in recorded.teachers.values())
    policy = f"rollouts of {recorded.policy.name!r} (replay.policy = {recorded.policy.revision!r})"
    source = policy if count_on_policy_prompts(config) else f"scores, for the completions of {config.data.path}"
    found.notes.append(f"{cache_folder(config, state.cache)} has {source}, scored by {scorers}")


def list_settings(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield (dotted key, value, whether it was set) for every setting; skip one that is None and was not set."""
    as_written = model.model_dump()
    for name in as_written:  # a custom objective's function is written as its kind
        value, is_set = as_written[name] if name == "kind" else getattr(model, name), name in model.model_fields_set
        if isinstance(value, BaseModel):
            yield from list_settings(value, f"{prefix}{name}.")
        elif isinstance(value, dict) and any(isinstance(entry, BaseModel) for entry in value.values()):
            for key, entry in value.items():
                yield from list_settings(entry, f"{prefix}{name}.{key}.")
        elif value is not None or is_set:
            yield f"{prefix}{name}", value, is_set


def _list_used_settings(config: RunConfig, *, served: bool) -> list[tuple[str, Any, bool]]:
    """List the settings that this run uses; a learning rate that is not set gets its default, which LoRA changes."""
    asks = served and any(teacher.urls for teacher in config.teacher_map().values())
    silent = {"client": not asks, "replay": served}
    found = [
        (key, value, is_set)
        for key, value, is_set in list_settings(config)
        if not silent.get(key.split(".")[0])
        and (is_set or (value not in ("", {}, ()) and not key.endswith(_LISTED_IF_SET)))
    ]
    if config.learner.lr is None:
        index = next(index for index, (key, *_) in enumerate(found) if key.startswith("learner."))
        rate = config.learner.learning_rate(lora=config.student.lora is not None)
        found.insert(index, ("learner.lr", rate, False))
    return found


async def _probe_all(config: RunConfig, found: DryRun, *, student: str | None) -> None:
    for name, teacher in select_teachers(config).items():
        for url in teacher.urls:
            try:
                report = await probe(
                    url, model=teacher.model, api_key=teacher.api_key(), student=student,
                    dialect=teacher.dialect, cached=True,
                )  # fmt: skip
            except TopkdError as error:
                found.endpoints.append(EndpointFinding(name, url, error.what, can_teach=False))
                if not any(url in problem for problem in found.problems):
                    found.problems.append(str(error))
                continue
            found.notes += [
                f"{url}: {finding.title}: {', '.join(filter(None, (finding.value, finding.detail)))}"
                for finding in report.findings
                if finding.status == "warn"
            ]
            known, model, dialect = report.capabilities, report.model, report.dialect
            found.endpoints.append(
                EndpointFinding(
                    name, url, report.verdict, report.can_teach, model, dialect, known.score_k, known.max_model_len
                )
            )
            if not report.can_teach and not any(url in problem for problem in found.problems):
                found.problems.append(f"the endpoint {report.verdict} ({url})")


def _describe_data(prompts: Prompts) -> dict[str, Any]:
    own = [row.prompt_ids.size for row in prompts.rows]
    teacher_sizes = [row.teacher_prompt_ids.size for row in prompts.rows]
    return {
        "rows": len(own),
        "dropped_overlong": len(prompts.dropped),
        "prompt_tokens": {"median": int(np.median(own)), "longest": max(own)},
        "teacher_prompt_tokens": {"median": int(np.median(teacher_sizes)), "longest": max(teacher_sizes)},
        "privileged": sum(
            not np.array_equal(row.prompt_ids, row.teacher_prompt_ids) for row in prompts.rows
        ),
        "with_completion": sum(row.completion_ids is not None for row in prompts.rows),
        "by_teacher": dict(Counter(row.teacher_id for row in prompts.rows)),
    }  # fmt: skip


def _render_first_row(prompts: Prompts) -> list[Rendered]:
    row, tokenizer = prompts.rows[0], prompts.tokenizer
    sides = [("student", row.prompt_ids)]
    if not np.array_equal(row.prompt_ids, row.teacher_prompt_ids):
        sides.append((f"teacher {row.teacher_id}".strip(), row.teacher_prompt_ids))
    return [
        Rendered(side, int(ids.size), [(tokenizer.decode(ids), False), *_split_completion(row, tokenizer)])
        for side, ids in sides
    ]


def _split_completion(row: PromptRow, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    if row.completion_ids is None:
        return
    mask = np.ones(row.completion_ids.size, dtype=bool) if row.completion_mask is None else row.completion_mask
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), mask.size]
    for first, last in pairwise(edges):
        yield tokenizer.decode(row.completion_ids[first:last]), bool(mask[first])


def _estimate(config: RunConfig, prompts: Prompts, teacher_infos: dict[str, TeacherInfo], found: DryRun) -> None:
    from topkd.engine.models.student import pick_device

    try:
        device = pick_device(config.student.device)
        found.device = str(device)
        dialects = {name: teacher.dialect for name, teacher in teacher_infos.items()}
        found.forecast = forecast(config, prompts.rows, device, dialects)
    except TopkdError as error:
        found.problems.append(str(error))
        return
    needed, there = found.forecast.memory_total, found.forecast.available
    if there and needed > there:
        found.notes.append(
            f"about {needed / 1e9:.1f} GB would be needed, the device has {there / 1e9:.1f} GB: lower "
            "learner.micro_batch_tokens or rollout.batch_size, set learner.gradient_checkpointing, use [student.lora]"
        )
