"""Export of scores and rollouts to Parquet or a Hugging Face dataset, and import from them.

docs/format.md lists the columns.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topkd.files import stage_file
from topkd.offline.exchange.parquet_files import import_parquet_module, open_parquet, read_batches
from topkd.offline.exchange.rollout_tables import (
    ROLLOUT_COLUMNS,
    build_column,
    build_nested_column,
    build_rollout_table,
    find_owner_json,
    import_rollouts,
    pad_lists,
)
from topkd.offline.store.codecs import CODEC_NAMES
from topkd.offline.store.folder import describe_disk_error
from topkd.offline.store.keys import TeacherIdentity
from topkd.offline.store.records import ROLLOUT, SCORE, Record
from topkd.offline.store.store import ScoreStore
from topkd.offline.store.tables import read_identities
from topkd.topk.errors import CacheError, ConfigError, DataError, TopkdError
from topkd.topk.types import TopK

if TYPE_CHECKING:
    import pyarrow as pa

SCORES_FILE, ROLLOUTS_FILE = "scores.parquet", "rollouts.parquet"
_BATCH = 256  # rows per Arrow batch: bounded memory whatever the cache holds


@dataclass(frozen=True, slots=True)
class Exchange:
    """Result of an import or export: records, positions, and rows that were refused, with reasons."""

    records: int
    tokens: int
    refused: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain types only."""
        return asdict(self)


def export_parquet(cache: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Exchange:
    """Write ``scores.parquet`` and, when there are any, ``rollouts.parquet``, replacing earlier exports.

    Values are float32 as the store returns them. Holes are empty lists, an unknown logprob is NaN, an exact zero -inf.
    """
    pq, target = import_parquet_module(), Path(folder)
    done = tokens = 0
    with ScoreStore(cache) as store, convert_write_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        names = read_identities(store.path)
        for kind, name, rows in (
            (SCORE, SCORES_FILE, _build_score_table),
            (ROLLOUT, ROLLOUTS_FILE, build_rollout_table),
        ):
            writer = None
            with stage_file(target / name) as staged:
                try:
                    for batch in _iter_batches(store.records(kinds=(kind,))):
                        table = rows(batch, names)
                        writer = writer or pq.ParquetWriter(staged, table.schema, compression="zstd")
                        writer.write_table(table)
                        done += len(batch)
                        tokens += sum(record.header.rows for record in batch)
                finally:
                    if writer is not None:
                        writer.close()
            if writer is None:  # an earlier export's: an import of the folder would take it for this cache's
                (target / name).unlink(missing_ok=True)
        return Exchange(done, tokens, list(store.damage))


@contextlib.contextmanager
def convert_write_errors(target: Path) -> Iterator[None]:
    """Convert errors of the file system to a one-line CacheError."""
    try:
        yield
    except TopkdError:
        raise
    except OSError as error:
        raise describe_disk_error("cannot export there", target, error) from error


def import_parquet(folder: str | os.PathLike[str], store: ScoreStore) -> Exchange:
    """Import a folder or file that ``export_parquet`` wrote; name the rows that do not fit."""
    path = Path(folder)
    both = [path / SCORES_FILE, path / ROLLOUTS_FILE] if path.is_dir() else [path]
    parts = [_import_file(file, store) for file in both if file.is_file()]
    if not parts:
        missing = "no Parquet scores there" if path.exists() else "no such file or folder"
        raise DataError(missing, where=str(both[0]))
    return Exchange(
        sum(part.records for part in parts), sum(part.tokens for part in parts),
        [reason for part in parts for reason in part.refused],
    )  # fmt: skip


def _import_file(file: Path, store: ScoreStore) -> Exchange:
    with open_parquet(file) as source:
        names = set(source.schema_arrow.names)
        rollouts = "completion_ids" in names
        missing = (ROLLOUT_COLUMNS if rollouts else {"ids", "start", "topk_ids", "topk_logp"}) - names
        if missing:
            raise DataError("Parquet file lacks columns", where=str(file), got=", ".join(source.schema_arrow.names),
                            expected=", ".join(sorted(missing)))  # fmt: skip
        rows = (row for batch in read_batches(source, file, batch_size=_BATCH) for row in batch.to_pylist())
        if not rollouts:
            return import_rows(rows, store, where=str(file))
        return Exchange(*import_rollouts(rows, store, where=str(file)))


def to_dataset(cache: str | os.PathLike[str]) -> Any:
    """Return the scores as an in-memory ``datasets.Dataset`` with the columns of ``scores.parquet``."""
    try:
        from datasets import Dataset
        from datasets.table import InMemoryTable
    except ImportError as error:
        raise ConfigError("datasets is not installed", hint='pip install "topkd[data]"') from error
    import pyarrow as pa

    with ScoreStore(cache) as store:
        names = read_identities(store.path)
        tables = [_build_score_table(batch, names) for batch in _iter_batches(store.records())]
        table = pa.concat_tables(tables) if tables else _build_score_table([], names)
    return Dataset(InMemoryTable(table))


def from_dataset(dataset: Iterable[dict[str, Any]], store: ScoreStore) -> Exchange:
    """Import the rows of ``to_dataset``, or any iterable of such rows, into a store."""
    return import_rows(dataset, store, where="dataset")


def import_rows(
    rows: Iterable[dict[str, Any]], store: ScoreStore, *, where: str, teacher: TeacherIdentity | None = None
) -> Exchange:
    """Import rows with the columns of ``scores.parquet`` into a store.

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
        except CacheError:
            raise  # no fault of the row
        except TopkdError as error:
            refused.append(f"{where}, row {number}: {error}")
            continue
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            refused.append(f"{where}, row {number}: not a score row ({type(error).__name__}: {error})")
            continue
        done += 1
        tokens += scores.rows
    store.commit()
    return Exchange(done, tokens, refused)


def _row_scores(row: dict[str, Any]) -> TopK:
    ids, logp = pad_lists(row)
    unknown = np.full(len(ids), np.nan, np.float32)
    actual_ids = row.get("actual_ids")
    if actual_ids is None:
        actual_ids = row["ids"][row["start"] + 1 :]
    actual, tail = row.get("actual_logp"), row.get("tail_logp")
    return TopK(
        row["start"],
        ids,
        logp,
        np.asarray(actual_ids),
        unknown if actual is None else np.asarray(actual, np.float32),
        unknown if tail is None else np.asarray(tail, np.float32),
    )


def _build_score_table(batch: Sequence[Record], names: dict[int, TeacherIdentity]) -> pa.Table:
    import pyarrow as pa

    decoded = [record.score() for record in batch]
    lists = [scores for _, scores in decoded]
    return pa.table(
        {
            "teacher": pa.array([find_owner_json(record, names) for record in batch], pa.string()),
            "ids": build_column([ids for ids, _ in decoded], pa.int32()),
            "start": pa.array([scores.start for _, scores in decoded], pa.int32()),
            "k": pa.array([record.header.asked for record in batch], pa.int32()),
            "codec": pa.array([CODEC_NAMES[record.header.codec] for record in batch], pa.string()),
            "actual_ids": build_column([scores.actual_ids for _, scores in decoded], pa.int32()),
            "actual_logp": build_column([scores.actual_logp for _, scores in decoded], pa.float32()),
            "tail_logp": build_column([scores.tail_logp for _, scores in decoded], pa.float32()),
            "topk_ids": build_nested_column(lists, "ids"),
            "topk_logp": build_nested_column(lists, "logp"),
        }
    )


def _iter_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
