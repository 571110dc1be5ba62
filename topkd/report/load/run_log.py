"""Reads a run's folder for a report: config, run log and recorded rollouts. A damaged line is an error that names it.

Only the run log is required. If a run lacks a field, the page lacks a panel, but it is still written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import xxhash

from topkd.report.load.run_folder import COMPARISON, CONFIG, RUN_LOG, TOKENS, is_deserted
from topkd.topk.errors import DataError

MEASURED = frozenset({"reverse_kl", "forward_kl", "jsd", "agreement", "accuracy"})
LISTED: Final = 20  # entries of a top-K list that a page shows
Record = dict[str, Any]


@dataclass(slots=True)
class GrowingFile:
    """A JSONL file that grows: each ``read`` returns the complete lines that are new since the last one."""

    path: Path
    offset: int = 0
    number: int = 0

    @property
    def shrunk(self) -> bool:
        """Whether the file is now shorter than the part that was read."""
        return self.offset > 0 and (not self.path.exists() or self.path.stat().st_size < self.offset)

    def read(self) -> list[Record]:
        """Read new records. A last line without its newline is still being written, and is left for later."""
        return [record for _, _, record in self.iterate()]

    def iterate(self) -> Iterator[tuple[int, int, Record]]:
        """Yield offset, size and record of each new line, one at a time."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                place = self.offset
                self.offset += len(line)
                self.number += 1
                if line.strip():
                    yield place, len(line), self._record(line.rstrip(b"\n"))

    def _record(self, line: bytes) -> Record:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise self._unreadable(line, "not JSON") from error
        if not isinstance(record, dict):
            raise self._unreadable(line, "not an object")
        return record

    def _unreadable(self, line: bytes, why: str) -> DataError:
        return DataError(
            f"unreadable line ({why})",
            where=f"{self.path}:{self.number}",
            got=line[:60].decode("utf-8", "replace"),
            expected="one JSON object per line",
        )


@dataclass(frozen=True, slots=True)
class StoredRollout:
    """A recorded rollout that stays in its file: the file has hundreds of times what a page shows.

    Attributes:
        path: ``tokens.jsonl``.
        offset: Of its line there.
        size: Bytes of the line.
        step: As recorded.
        prompt: Hash of its prompt.
        tokens: How many it has.
        entries: Entries of the lists beside them, as far as a page shows them.
    """

    path: Path
    offset: int
    size: int
    step: Any
    prompt: str
    tokens: int
    entries: int

    def read(self) -> Record:
        """Read the rollout from its file."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return dict(json.loads(file.read(self.size)))
        except (OSError, ValueError, TypeError) as error:
            what = "the recorded rollouts changed while they were read"
            raise DataError(what, where=str(self.path), hint="did the run resume? make the page again") from error


def index_rollouts(file: GrowingFile) -> list[StoredRollout | None]:
    """List the rollouts that are new in a file; None for a record that is no rollout."""
    return [_index_rollout(file.path, offset, size, record) for offset, size, record in file.iterate()]


def _index_rollout(path: Path, offset: int, size: int, record: Record) -> StoredRollout | None:
    tokens = record.get("tokens")
    if not isinstance(tokens, list):
        return None
    lists = [token.get(side) for token in tokens if isinstance(token, dict) for side in ("teacher", "student")]
    entries = sum(min(LISTED, len(entries)) for entries in lists if isinstance(entries, list))
    prompt = xxhash.xxh3_128_hexdigest(json.dumps(record.get("prompt")).encode())
    return StoredRollout(path, offset, size, record.get("step"), prompt, len(tokens), entries)


@dataclass(slots=True)
class LoggedRun:
    """One run: its folder, its settings, and its records so far.

    Attributes:
        path: Its folder.
        name: Its name on the page.
        config: Contents of ``config.json`` ({} if there is none).
        params: The settings that a comparison varied ({} outside one).
        seed: Pairs runs of different settings; None if unknown.
        failed: Whether its comparison lists it as failed.
        left: Whether no process works on it any more (known only for runs of this machine).
        replayed: Whether a comparison trained it on another run's rollouts, which tests estimators off-policy.
        derived: Results that were computed from the records; cleared when there are new records.
    """

    path: Path
    name: str
    config: Record = field(default_factory=dict)
    params: Record = field(default_factory=dict)
    seed: int | None = None
    failed: bool = False
    left: bool = False
    replayed: bool = False
    steps: list[Record] = field(default_factory=list)
    evals: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    rollouts: list[StoredRollout] = field(default_factory=list)
    derived: dict[str, Any] = field(default_factory=dict)
    _run_log: GrowingFile | None = None
    _tokens: GrowingFile | None = None

    def refresh(self) -> bool:
        """Read new records; return whether there were any, or whether the run's process has ended or come back."""
        was_left = self.left
        self.left = is_deserted(self.path)  # test this before reading, so that the last records are read too
        if not self.config:
            self.config = read_config(self.path)
            if self.seed is None and isinstance(self.config.get("seed"), int):
                self.seed = self.config["seed"]
        if self._run_log is None or self._tokens is None or self._run_log.shrunk or self._tokens.shrunk:
            # The first read; or a resumed run has shortened its run log, so that all records must be read again.
            self._run_log, self._tokens = GrowingFile(self.path / RUN_LOG), GrowingFile(self.path / TOKENS)
            for read in (self.steps, self.evals, self.events, self.rollouts):
                read.clear()
        records, rollouts = self._run_log.read(), index_rollouts(self._tokens)
        for record in records:
            kind = record.get("kind")
            if kind == "eval":
                self.evals += split_evaluation(record)
            else:
                (self.steps if kind == "step" else self.events).append(record)
        self.rollouts += [rollout for rollout in rollouts if rollout is not None]
        if records or rollouts:
            self.derived.clear()
        return bool(records or rollouts) or self.left != was_left

    @property
    def planned(self) -> int | None:
        """Number of steps in the config; None if it has none."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def foreign(self) -> bool:
        """Whether another policy than the trained student sampled its completions: log s - log t then estimates no KL.

        A run on its own rollouts logs their staleness; a run on those of others logs null.
        """
        sampled = next((step for step in self.steps if step.get("kl_k1") is not None), {})
        return "staleness" in sampled and sampled["staleness"] is None

    @property
    def state(self) -> str:
        """One of failed, stopped, finished, unfinished (its process has ended), running (or it is not known)."""
        if self.failed:
            return "failed"
        turns = [event["event"] for event in self.events if event.get("event") in ("start", "resumed", "stopped")]
        if turns and turns[-1] == "stopped":
            return "stopped"
        last = find_last_step(self.steps)
        if self.planned is not None and last >= self.planned:
            return "finished"
        return "unfinished" if self.left else "running"


def split_evaluation(record: Record) -> list[Record]:
    """Split an evaluation into one flat record for each kind of prefixes."""
    flat_, nested = {}, []
    for key, value in record.items():
        if isinstance(value, dict) and MEASURED & value.keys():
            nested.append({"step": record.get("step"), "prefixes": key, **value})
        else:
            flat_[key] = value
    return [flat_, *nested] if MEASURED & flat_.keys() or not nested else nested


def read_run(path: Path, *, name: str | None = None, waiting: bool = False) -> LoggedRun:
    """Read the run in a folder. ``waiting`` accepts a folder without a run log, for a page that follows the run."""
    if not waiting and not (path / RUN_LOG).exists():
        raise DataError(
            "there is no run in this folder",
            where=str(path),
            got=_what_is_there(path),
            expected=f"a folder with {RUN_LOG} (a run) or {COMPARISON} (a comparison)",
            hint="give the folder that topkd train, replay, demo or compare wrote with --out",
        )
    run = LoggedRun(path, name or path.resolve().name)
    run.refresh()
    return run


def read_config(path: Path) -> Record:
    """Read ``config.json`` of a run; return {} if there is none, and raise DataError if it is damaged."""
    file = path / CONFIG
    if not file.exists():
        return {}
    return read_object(file)


def read_object(file: Path) -> Record:
    """Read a JSON file that holds one object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"), parse_constant=str)  # NaN and Infinity are not JSON
    except (OSError, ValueError) as error:
        raise DataError("unreadable JSON file", where=str(file), got=str(error)) from error
    if not isinstance(value, dict):
        raise DataError("unreadable JSON file", where=str(file), got=type(value).__name__, expected="an object")
    return value


def find_last_step(steps: list[Record]) -> int:
    """Return the last step's number; 0 before the first."""
    return next((step["step"] for step in reversed(steps) if isinstance(step.get("step"), int)), 0)


def flatten_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings into dotted keys: {"objective": {"beta": .5}} -> {"objective.beta": .5}."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            out |= flatten_settings(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "no such folder"
    if path.is_file():
        return "a file"
    return ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "an empty folder"
