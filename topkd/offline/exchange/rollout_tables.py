"""Rollouts as rows of a table, and the Arrow columns that scores and rollouts share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from topkd.offline.store.keys import KEY_BYTES, TeacherIdentity
from topkd.offline.store.records import Record
from topkd.offline.store.store import ScoreStore, check_asked_k
from topkd.topk.errors import CacheError, DataError, TopkdError
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import PAD_ID, Float32, TopK

if TYPE_CHECKING:
    import pyarrow as pa

ROLLOUT_COLUMNS = {"policy", "request", "prompt_ids", "completion_ids", "logp", "finish_reason", "version", "sampling"}


def build_rollout_table(batch: Sequence[Record], names: dict[int, TeacherIdentity]) -> pa.Table:
    """Build a table of one row a rollout; lists are null where the policy gave none."""
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
            "topk_actual_ids": build_column(
                [None if scores is None else scores.actual_ids for scores in lists], pa.int32()
            ),
            "topk_actual_logp": build_column(
                [None if scores is None else scores.actual_logp for scores in lists], pa.float32()
            ),
            "topk_tail_logp": build_column(
                [None if scores is None else scores.tail_logp for scores in lists], pa.float32()
            ),
        }
    )


def import_rollouts(rows: Iterable[dict[str, Any]], store: ScoreStore, *, where: str) -> tuple[int, int, list[str]]:
    """Import rows of ``build_rollout_table``; return records, tokens and refused rows.

    Rows of one request follow each other, and are found under the same request again.
    """
    done = tokens = number = 0
    refused: list[str] = []
    for (policy, request), group in groupby(rows, key=lambda row: (row["policy"], row["request"])):
        first, members = number, list(group)
        number += len(members)
        try:
            identity, key = TeacherIdentity.from_json(policy or "null"), bytes.fromhex(request)
            if len(key) != KEY_BYTES:
                raise DataError("a request is a key of 32 hex digits", got=request)
            rollouts = [_rollout(row) for row in members]
            store.keep_rollouts(identity, key, rollouts, k=check_asked_k(members[0].get("k")))
        except CacheError:
            raise  # no fault of the rows
        except TopkdError as error:
            refused.append(f"{where}, row {first}: {error}")
            continue
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            refused.append(f"{where}, row {first}: not a rollout row ({error})")
            continue
        done += 1
        tokens += sum(int(rollout.completion_ids.size) for rollout in rollouts)
    store.commit()
    return done, tokens, refused


def _rollout(row: dict[str, Any]) -> Rollout:
    sampling = json.loads(row["sampling"])
    params = SamplingParams(**{**sampling, "stop_token_ids": tuple(sampling["stop_token_ids"])})
    prompt, completion = np.asarray(row["prompt_ids"]), np.asarray(row["completion_ids"])  # their checks see any float
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
