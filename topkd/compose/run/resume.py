"""Resumes a run that ended early: with the same config, from the newest intact checkpoint and the run log up to it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topkd.compose.config.run_config import save_config, validate_config
from topkd.compose.run.folder import check_free, check_resumable
from topkd.engine import EngineConfig
from topkd.engine.loop.metrics import read_metrics
from topkd.files import write_atomically
from topkd.report.load.run_folder import CONFIG, RUN_LOG, STUDENT, TOKENS
from topkd.report.load.run_log import flatten_settings
from topkd.topk.errors import ConfigError, DataError

if TYPE_CHECKING:
    from topkd.engine.checkpoint.checkpoint import Checkpoint

# Settings that may change on a resume: addresses and keys of servers, the client, checkpoints, trackers.
FREE = ("client.*", "checkpoint.*", "track.*", "teacher.url*", "teachers.*.url*", "*.api_key_env", "sampler.url")


@dataclass(frozen=True, slots=True)
class PreviousRun:
    """The run that is already in a folder.

    Attributes:
        checkpoint: The checkpoint to continue from; None: from the beginning.
        steps: Its step records up to the checkpoint.
        evals: Its evaluations up to the checkpoint.
        events: Its events up to the checkpoint.
        finished: Whether the run is finished.
        resumed: Whether there is a run to resume.
        config: The config with which the run continues.
    """

    checkpoint: Checkpoint | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    resumed: bool = False
    config: EngineConfig | None = None

    @property
    def step(self) -> int:
        """Number of steps before the checkpoint; 0 without one."""
        return 0 if self.checkpoint is None else self.checkpoint.position.step


def read_previous_run(
    out: Path, config: EngineConfig, *, command: str, note: Callable[[str], None] = lambda _: None
) -> PreviousRun:
    """Read the run in a folder; refuse one that this command and config cannot resume.

    Nothing in the folder is changed; ``truncate_to_checkpoint`` does that.
    """
    check_resumable(out)
    records = read_metrics(out / RUN_LOG) if (out / RUN_LOG).exists() else []
    _refuse_another_command(out, records, command)
    _refuse_changes(out, config)
    if _count_finished_steps(out) >= config.steps:
        return _select_records(PreviousRun(finished=True), records)
    checkpoint = _find_checkpoint(out, config, note)
    length = _count_kept_bytes(out, checkpoint)
    kept = records[: (out / RUN_LOG).read_bytes()[:length].count(b"\n")] if length else []
    return _select_records(PreviousRun(checkpoint, config=config), kept)


def _find_checkpoint(out: Path, config: EngineConfig, on_damage: Callable[[str], None]) -> Checkpoint | None:
    from topkd.engine.checkpoint.checkpoint import find_newest_checkpoint

    checkpoint = find_newest_checkpoint(out, on_damage)
    if checkpoint is not None and checkpoint.position.step > config.steps:
        raise ConfigError(
            "the run has already taken more steps", where=str(out), got=f"steps = {config.steps}",
            expected=checkpoint.position.step,
        )  # fmt: skip
    return checkpoint


def _select_records(previous: PreviousRun, records: list[dict[str, Any]]) -> PreviousRun:
    kinds: dict[str, list[dict[str, Any]]] = {"step": [], "eval": [], "event": []}
    for record in records:
        kinds.setdefault(record["kind"], []).append({key: value for key, value in record.items() if key != "kind"})
    return replace(previous, steps=kinds["step"], evals=kinds["eval"], events=kinds["event"], resumed=True)


def truncate_to_checkpoint(out: Path, previous: PreviousRun) -> None:
    """Remove what a resumed run wrote after its checkpoint. Call it last: an error before it then changes nothing."""
    if previous.resumed and previous.config is not None:
        _truncate_records(out, previous.checkpoint)
        save_config(previous.config, out / CONFIG)


def preview_resume(out: Path, config: EngineConfig, *, command: str, resume: bool) -> tuple[str, PreviousRun]:
    """Read the run in a folder, and describe it ("": no run); raise the error that a run would raise."""
    if not resume:
        check_free(out)
        return "", PreviousRun()
    damage: list[str] = []
    previous = read_previous_run(out, config, command=command, note=damage.append)
    if previous.finished:
        return f"{out} is finished: {len(previous.steps)} steps; nothing to resume", previous
    where = "from the beginning" if previous.checkpoint is None else f"after step {previous.step}"
    return "; ".join([*damage, f"the run in {out} would continue {where}"]), previous


def _refuse_another_command(out: Path, records: list[dict[str, Any]], command: str) -> None:
    former = next((record["command"] for record in records if "command" in record), command)
    if former != command:
        raise ConfigError(f"this run was made by topkd {former}", where=str(out), hint=f"use topkd {former} --resume")


def _refuse_changes(out: Path, config: EngineConfig) -> None:
    path = out / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("the run's config cannot be read", where=str(path), got=str(error)) from error
    before = flatten_settings(validate_config(type(config), values, where=str(path)).model_dump(mode="json"))
    now = flatten_settings(config.model_dump(mode="json"))
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key != "steps" and not any(fnmatchcase(key, free) for free in FREE)
    ]
    if now["steps"] < before["steps"]:
        changed.append(f"steps {before['steps']} -> {now['steps']} (it may only grow)")
    if changed:
        raise ConfigError(
            "the config is not the one that the run began with", where=str(out), got=", ".join(changed),
            hint="resume with the former values, or start a new run in another --out",
        )  # fmt: skip


def _count_finished_steps(out: Path) -> int:
    """Count the steps of a finished run; return 0 for any other run."""
    try:
        state = json.loads((out / STUDENT / "topkd.json").read_text(encoding="utf-8"))
        return 0 if state["stopped"] else int(state["version"])
    except (OSError, ValueError, KeyError):
        return 0


def _count_kept_bytes(out: Path, checkpoint: Checkpoint | None) -> int:
    """Count the bytes of the run log that are kept: those from before the checkpoint."""
    run_log, length = out / RUN_LOG, 0 if checkpoint is None else checkpoint.run_log_bytes
    there = run_log.stat().st_size if run_log.exists() else 0
    if there < length:
        raise DataError(
            "the run log is shorter than at the checkpoint", where=str(run_log), got=f"{there} bytes",
            expected=f"at least {length}", hint="was it edited? restore it, or start a new run",
        )  # fmt: skip
    return length


def _truncate_records(out: Path, checkpoint: Checkpoint | None) -> None:
    """Remove the records from after the checkpoint; they will be written again."""
    length, step = _count_kept_bytes(out, checkpoint), 0 if checkpoint is None else checkpoint.position.step
    if (out / RUN_LOG).exists():
        os.truncate(out / RUN_LOG, length)
    tokens = out / TOKENS
    if tokens.exists():
        kept = [line for line in tokens.read_bytes().splitlines(keepends=True) if _is_within(line, step)]
        write_atomically(tokens, b"".join(kept))


def _is_within(line: bytes, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False  # a line that a killed process left incomplete


def check_same_rows(events: Sequence[Mapping[str, Any]], note: dict[str, Any], where: str) -> None:
    """Raise DataError if the prompts are not those of the run log; a run log without a digest passes."""
    began = next((event["prompts"] for event in events if "prompts" in event), note)
    if began != note:
        raise DataError(
            "the prompts are not those that the run began with",
            where=where,
            got=_describe_prompts(note),
            expected=_describe_prompts(began),
            hint="restore the former file, or start a new run in another --out",
        )


def _describe_prompts(note: dict[str, Any]) -> str:
    return f"{note['rows']} rows, digest {note['xxh3_128'][:8]}"


def describe_process_change(previous: PreviousRun, size: int) -> str:
    """Return a warning about a resume with more or fewer processes than before; "" if nothing changed."""
    before = [event["processes"] for event in previous.events if "processes" in event]
    if not before or before[-1] == size:
        return ""
    return (
        f"careful: torchrun had {before[-1]} processes before and has {size} now: completions get other seeds "
        "from this step on, because rollout.shards is 0 (one per process)"
    )
