"""Export of scores and rollouts to Parquet or a Hugging Face dataset, and import from them.

docs/format.md lists the columns.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from topkd.files import stage_file
from topkd.offline.exchange.parquet_files import import_parquet_module, open_parquet, read_batches
from topkd.offline.store.codecs import CODEC_NAMES
from topkd.offline.store.folder import describe_disk_error
from topkd.offline.store.keys import KEY_BYTES, TeacherIdentity
from topkd.offline.store.records import ROLLOUT, SCORE, Record
from topkd.offline.store.store import ScoreStore, check_asked_k
from topkd.offline.store.tables import read_identities
from topkd.topk.errors import CacheError, ConfigError, DataError, TopkdError
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import PAD_ID, Float32, TopK

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
SCORES_FILE, ROLLOUTS_FILE = "scores.parquet", "rollouts.parquet"
_BATCH = 256  # rows per Arrow batch: bounds the memory for a cache of any size


@dataclass(frozen=True, slots=True)
class Exchange:
    """Result of an import or export: counts of records and positions, and the refused rows with reasons."""

    records: int
    tokens: int
    refused: list[str]


def export_parquet(cache: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Exchange:
    """Write ``scores.parquet`` and, when there are any, ``rollouts.parquet``, replacing earlier exports.

    Values are float32 as the store returns them. A hole is an empty list, an unknown logprob NaN, probability zero
    -inf.
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
            if writer is None:  # left by an earlier export: an import of the folder would read it too
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
    """Import a folder or file that ``export_parquet`` wrote; list the rows that are not valid."""
    path = Path(folder)
    both = [path / SCORES_FILE, path / ROLLOUTS_FILE] if path.is_dir() else [path]
    parts = [_import_file(file, store) for file in both if file.is_file()]
    if not parts:
        missing = "no Parquet file of scores there" if path.exists() else "no such file or folder"
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
            raise DataError("the Parquet file lacks columns", where=str(file), got=", ".join(source.schema_arrow.names),
                            expected=", ".join(sorted(missing)))  # fmt: skip
        rows = (row for batch in read_batches(source, file, batch_size=_BATCH) for row in batch.to_pylist())
        if not rollouts:
            return _import_scores(rows, store, where=str(file))
        return import_rollouts(rows, store, where=str(file))


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
    return _import_scores(dataset, store, where="dataset")


def _import_scores(rows: Iterable[dict[str, Any]], store: ScoreStore, *, where: str) -> Exchange:
    """Import rows with at least ``teacher``, ``ids``, ``start``, ``topk_ids`` and ``topk_logp``."""

    def keep(row: dict[str, Any]) -> int:
        if not row.get("teacher"):
            raise DataError("the row names no teacher", expected="a column teacher, as topkd cache export writes it")
        scores = _row_scores(row)
        store.put(TeacherIdentity.from_json(row["teacher"]), row["ids"], scores, asked=row.get("k"))
        return scores.rows

    return keep_each(enumerate(rows), store, keep, where=where, what="score row")


def keep_each(
    items: Iterable[tuple[int, T]], store: ScoreStore, keep: Callable[[T], int], *, where: str, what: str
) -> Exchange:
    """Store items one by one; list those that are not valid.

    Args:
        items: Row numbers, and the rows' contents.
        store: Open for appending.
        keep: Stores an item, and returns its positions.
        where: The source, in messages.
        what: What to call a row in messages.
    """
    done = tokens = 0
    refused: list[str] = []
    for number, item in items:
        place = f"{where}, row {number}" if where else f"row {number}"
        try:
            tokens += keep(item)
        except CacheError:
            raise  # not the row's fault
        except TopkdError as error:
            refused.append(f"{place}: {error}")
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            refused.append(f"{place}: not a {what} ({type(error).__name__}: {error})")
        else:
            done += 1
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


if TYPE_CHECKING:
    import pyarrow as pa

ROLLOUT_COLUMNS = {"policy", "request", "prompt_ids", "completion_ids", "logp", "finish_reason", "version", "sampling"}


def build_rollout_table(batch: Sequence[Record], names: dict[int, TeacherIdentity]) -> pa.Table:
    """Build a table with one row per rollout; lists are null where the policy returned none."""
    import pyarrow as pa

    rows = [(record, rollout) for record in batch for rollout in record.rollouts()]
    lists = [rollout.topk for _, rollout in rows]
    return pa.table(
        {
            "policy": pa.array([find_owner_json(record, names) for record, _ in rows], pa.string()),
            "request": pa.array([record.header.key.hex() for record, _ in rows], pa.string()),
            "k": pa.array([record.header.asked for record, _ in rows], pa.int32()),
            "prompt_ids": build_column([rollout.prompt_ids for _, rollout in rows], pa.int32()),
            "completion_ids": build_column([rollout.completion_ids for _, rollout in rows], pa.int32()),
            "logp": build_column([rollout.logp for _, rollout in rows], pa.float32()),
            "finish_reason": pa.array([rollout.finish_reason for _, rollout in rows], pa.string()),
            "version": pa.array([rollout.version for _, rollout in rows], pa.string()),
            "sampling": pa.array([json.dumps(asdict(rollout.sampling)) for _, rollout in rows], pa.string()),
            "topk_ids": build_nested_column(lists, "ids"),
            "topk_logp": build_nested_column(lists, "logp"),
            **{
                f"topk_{name}": build_column(
                    [None if scores is None else getattr(scores, name) for scores in lists], kind
                )
                for name, kind in (
                    ("actual_ids", pa.int32()),
                    ("actual_logp", pa.float32()),
                    ("tail_logp", pa.float32()),
                )
            },
        }
    )


def import_rollouts(rows: Iterable[dict[str, Any]], store: ScoreStore, *, where: str) -> Exchange:
    """Import rows of ``build_rollout_table``; the adjacent rows of one request become one record."""

    def keep(members: list[dict[str, Any]]) -> int:
        identity, key = TeacherIdentity.from_json(members[0]["policy"] or "null"), bytes.fromhex(members[0]["request"])
        if len(key) != KEY_BYTES:
            raise DataError("column `request` must be a record key of 32 hex digits", got=members[0]["request"])
        rollouts = [_read_rollout(row) for row in members]
        store.keep_rollouts(identity, key, rollouts, k=check_asked_k(members[0].get("k")))
        return sum(int(rollout.completion_ids.size) for rollout in rollouts)

    requests = groupby(enumerate(rows), key=lambda item: (item[1]["policy"], item[1]["request"]))
    groups = (list(group) for _, group in requests)
    items = ((group[0][0], [row for _, row in group]) for group in groups)
    return keep_each(items, store, keep, where=where, what="rollout row")


def _read_rollout(row: dict[str, Any]) -> Rollout:
    sampling = json.loads(row["sampling"])
    params = SamplingParams(**{**sampling, "stop_token_ids": tuple(sampling["stop_token_ids"])})
    prompt, completion = np.asarray(row["prompt_ids"]), np.asarray(row["completion_ids"])  # the checks see floats
    topk = None
    if row.get("topk_ids") is not None:
        ids, logp = pad_lists(row)
        exact = (np.array(row[f"topk_{name}_logp"], np.float32) for name in ("actual", "tail"))
        topk = TopK(prompt.size - 1, ids, logp, np.asarray(row["topk_actual_ids"]), *exact)
    return Rollout(
        prompt, completion, np.array(row["logp"], np.float32), row["finish_reason"], params, topk, row["version"]
    )


def pad_lists(row: dict[str, Any]) -> tuple[NDArray[Any], Float32]:
    """Pad the lists of a row to one width."""
    lists, logps = row["topk_ids"], row["topk_logp"]
    if len(lists) != len(logps) or any(len(a) != len(b) for a, b in zip(lists, logps, strict=True)):
        raise DataError("topk_ids and topk_logp differ in shape")
    width = max((len(entries) for entries in lists), default=0)
    ids = np.full((len(lists), width), PAD_ID, np.int64)
    logp = np.full((len(lists), width), -np.inf, np.float32)
    for r, (tokens, values) in enumerate(zip(lists, logps, strict=True)):
        ids[r, : len(tokens)], logp[r, : len(tokens)] = [index(token) for token in tokens], values
    return ids, logp


def find_owner_json(record: Record, names: dict[int, TeacherIdentity]) -> str | None:
    """Return the JSON of the teacher or policy that a record belongs to."""
    identity = names.get(record.header.tag)
    return None if identity is None else identity.to_json()


def build_column(arrays: Sequence[Any], kind: Any) -> Any:
    """Build a column of lists, null for None."""
    import pyarrow as pa

    values = [array for array in arrays if array is not None]
    return pa.ListArray.from_arrays(_offsets(arrays), pa.array(np.concatenate(values) if values else np.zeros(0), kind))


def build_nested_column(lists: Sequence[TopK | None], field: str) -> Any:
    """Build a column of lists of lists without pads, null for None."""
    import pyarrow as pa

    kind = {"ids": pa.int32(), "logp": pa.float32()}[field]
    inner = []
    for scores in lists:
        if scores is not None:
            counts = np.concatenate([[0], np.cumsum(scores.listed.sum(axis=1))]).astype(np.int32)
            inner.append(pa.ListArray.from_arrays(counts, getattr(scores, field)[scores.listed]))
    rows = [None if scores is None else scores.ids for scores in lists]
    return pa.ListArray.from_arrays(_offsets(rows), pa.concat_arrays(inner) if inner else pa.array([], pa.list_(kind)))


def _offsets(arrays: Sequence[Any]) -> Any:
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum([0 if array is None else len(array) for array in arrays])]).tolist()
    absent = [*(array is None for array in arrays), False]
    return pa.array([None if gone else end for gone, end in zip(absent, ends, strict=True)], pa.int32())
