"""Scores and rollouts as Parquet files or a Hugging Face dataset, and back. docs/format.md lists the columns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topkd.offline.codecs import CODEC_NAMES
from topkd.offline.keys import TeacherIdentity
from topkd.offline.records import ROLLOUT, SCORE, Record
from topkd.offline.store import ScoreStore
from topkd.offline.tables import identities
from topkd.topk.errors import ConfigError, DataError, TopkdError
from topkd.topk.types import PAD_ID, TopK

if TYPE_CHECKING:
    import pyarrow as pa

SCORES_FILE, ROLLOUTS_FILE = "scores.parquet", "rollouts.parquet"
_BATCH = 256  # rows per Arrow batch: bounded memory whatever the cache holds


@dataclass(frozen=True, slots=True)
class Exchange:
    """What went over: records, positions, and what was refused with its reason."""

    records: int
    tokens: int
    refused: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return asdict(self)


def export_parquet(cache: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Exchange:
    """Writes ``scores.parquet`` and, when there are any, ``rollouts.parquet`` (as lists of nested JSON) to a folder.

    Values are float32 as the store returns them. Holes are empty lists, an unknown logprob is NaN, an exact zero -inf.
    """
    pq = _parquet()
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    done = tokens = 0
    with ScoreStore(cache) as store:
        names = identities(store.path)
        for kind, name, rows in ((SCORE, SCORES_FILE, _score_rows), (ROLLOUT, ROLLOUTS_FILE, _rollout_rows)):
            temporary, writer = target / f".{name}.tmp", None
            try:
                for batch in _batched(store.records(kinds=(kind,))):
                    table = rows(batch, names)
                    writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
                    writer.write_table(table)
                    done += len(batch)
                    tokens += sum(record.header.rows for record in batch)
            finally:
                if writer is not None:
                    writer.close()
            if writer is not None:
                temporary.replace(target / name)
        return Exchange(done, tokens, list(store.damage))


def import_parquet(folder: str | os.PathLike[str], store: ScoreStore) -> Exchange:
    """Brings the scores of ``export_parquet`` (a folder or one file) into a store; rows that do not fit are named.

    Rollouts need their request's key and are merged between caches instead (``merge``).
    """
    pq = _parquet()
    path = Path(folder)
    file = path / SCORES_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError("no such file or folder" if not path.exists() else "no Parquet scores there", where=str(file))
    with pq.ParquetFile(file) as source:
        missing = {"ids", "start", "topk_ids", "topk_logp"} - set(source.schema_arrow.names)
        if missing:
            raise DataError("Parquet file lacks columns", where=str(file), got=", ".join(source.schema_arrow.names),
                            expected=", ".join(sorted(missing)))  # fmt: skip
        rows = (row for batch in source.iter_batches(batch_size=_BATCH) for row in batch.to_pylist())
        return import_rows(rows, store, where=str(file))


def to_dataset(cache: str | os.PathLike[str]) -> Any:
    """The scores as an in-memory ``datasets.Dataset`` with the columns of ``scores.parquet``."""
    try:
        from datasets import Dataset
        from datasets.table import InMemoryTable
    except ImportError as error:
        raise _lacking("datasets") from error
    import pyarrow as pa

    with ScoreStore(cache) as store:
        names = identities(store.path)
        tables = [_score_rows(batch, names) for batch in _batched(store.records())]
        table = pa.concat_tables(tables) if tables else _score_rows([], names)
    return Dataset(InMemoryTable(table))


def from_dataset(dataset: Iterable[dict[str, Any]], store: ScoreStore) -> Exchange:
    """Brings the rows of ``to_dataset`` (or any iterable of such rows) into a store."""
    return import_rows(dataset, store, where="dataset")


def import_rows(
    rows: Iterable[dict[str, Any]], store: ScoreStore, *, where: str, teacher: TeacherIdentity | None = None
) -> Exchange:
    """Rows with the columns of ``scores.parquet`` into a store.

    Args:
        rows: Mappings with at least ``ids``, ``start``, ``topk_ids``, ``topk_logp``.
        store: Open for appending.
        where: What to call the source in messages.
        teacher: Whose scores these are, where the rows have no ``teacher`` column.
    """
    done = tokens = 0
    refused = []
    for number, row in enumerate(rows):
        try:
            identity = TeacherIdentity.from_json(row["teacher"]) if row.get("teacher") else teacher
            if identity is None:
                raise DataError("a row names no teacher", hint="pass teacher=")
            scores = _row_scores(row)
            store.put(identity, row["ids"], scores, asked=row.get("k"))
        except TopkdError as error:
            refused.append(f"{where}, row {number}: {error}")
            continue
        except (KeyError, TypeError, ValueError) as error:
            refused.append(f"{where}, row {number}: not a score row ({type(error).__name__}: {error})")
            continue
        done += 1
        tokens += scores.rows
    store.commit()
    return Exchange(done, tokens, refused)


def _row_scores(row: dict[str, Any]) -> TopK:
    lists, logps = row["topk_ids"], row["topk_logp"]
    if len(lists) != len(logps) or any(len(a) != len(b) for a, b in zip(lists, logps, strict=True)):
        raise DataError("topk_ids and topk_logp differ in shape")
    width = max((len(entries) for entries in lists), default=0)
    ids = np.full((len(lists), width), PAD_ID, np.int32)
    logp = np.full((len(lists), width), -np.inf, np.float32)
    for r, (tokens, values) in enumerate(zip(lists, logps, strict=True)):
        ids[r, : len(tokens)], logp[r, : len(tokens)] = tokens, values
    unknown = np.full(len(lists), np.nan, np.float32)
    actual_ids = row.get("actual_ids")
    if actual_ids is None:
        actual_ids = row["ids"][row["start"] + 1 :]
    actual, tail = row.get("actual_logp"), row.get("tail_logp")
    return TopK(
        row["start"],
        ids,
        logp,
        np.asarray(actual_ids, np.int32),
        unknown if actual is None else np.asarray(actual, np.float32),
        unknown if tail is None else np.asarray(tail, np.float32),
    )


def _score_rows(batch: Sequence[Record], names: dict[int, TeacherIdentity]) -> pa.Table:
    import pyarrow as pa

    decoded = [record.score() for record in batch]
    lists, logps = [], []
    for _, scores in decoded:
        counts = np.concatenate([[0], np.cumsum(scores.listed.sum(axis=1))]).astype(np.int32)
        inner = pa.ListArray.from_arrays(counts, scores.ids[scores.listed])
        lists.append(inner)
        logps.append(pa.ListArray.from_arrays(counts, scores.logp[scores.listed]))
    return pa.table(
        {
            "teacher": pa.array([_name(record, names) for record in batch], pa.string()),
            "ids": _flat([ids for ids, _ in decoded], pa.int32()),
            "start": pa.array([scores.start for _, scores in decoded], pa.int32()),
            "k": pa.array([record.header.asked for record in batch], pa.int32()),
            "codec": pa.array([CODEC_NAMES[record.header.codec] for record in batch], pa.string()),
            "actual_ids": _flat([scores.actual_ids for _, scores in decoded], pa.int32()),
            "actual_logp": _flat([scores.actual_logp for _, scores in decoded], pa.float32()),
            "tail_logp": _flat([scores.tail_logp for _, scores in decoded], pa.float32()),
            "topk_ids": _nested(lists, pa.int32()),
            "topk_logp": _nested(logps, pa.float32()),
        }
    )


def _rollout_rows(batch: Sequence[Record], names: dict[int, TeacherIdentity]) -> pa.Table:
    import pyarrow as pa

    rows = [(record, rollout) for record in batch for rollout in record.rollouts()]
    return pa.table(
        {
            "policy": pa.array([_name(record, names) for record, _ in rows], pa.string()),
            "request": pa.array([record.header.key.hex() for record, _ in rows], pa.string()),
            "prompt_ids": _flat([rollout.prompt_ids for _, rollout in rows], pa.int32()),
            "completion_ids": _flat([rollout.completion_ids for _, rollout in rows], pa.int32()),
            "logp": _flat([rollout.logp for _, rollout in rows], pa.float32()),
            "finish_reason": pa.array([rollout.finish_reason for _, rollout in rows], pa.string()),
            "version": pa.array([rollout.version for _, rollout in rows], pa.string()),
            "sampling": pa.array([json.dumps(asdict(rollout.sampling)) for _, rollout in rows], pa.string()),
        }
    )


def _name(record: Record, names: dict[int, TeacherIdentity]) -> str | None:
    identity = names.get(record.header.tag)
    return None if identity is None else identity.to_json()


def _flat(arrays: Sequence[Any], kind: Any) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    return pa.ListArray.from_arrays(offsets, pa.array(values, kind))


def _nested(lists: Sequence[Any], kind: Any) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(array) for array in lists])]).astype(np.int32)
    values = pa.concat_arrays(lists) if lists else pa.array([], pa.list_(kind))
    return pa.ListArray.from_arrays(offsets, values)


def _batched(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _parquet() -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise _lacking("pyarrow") from error
    return pq


def _lacking(name: str) -> ConfigError:
    return ConfigError(f"{name} is not installed", hint='pip install "topkd[data]"')
