"""Statistics and verification of a cache."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from topkd.offline.store.codecs import CODEC_NAMES
from topkd.offline.store.folder import open_folder
from topkd.offline.store.records import KIND_NAMES, ROLLOUT, SCORE, Header
from topkd.offline.store.segment_writer import is_locked_by_writer
from topkd.offline.store.segments import TORN, Damage, Segment, list_segments
from topkd.offline.store.tables import (
    concat_tables,
    count_bytes,
    find_live_rows,
    open_tables,
    read_teachers,
    select_answer_rows,
    tabulate_headers,
)
from topkd.topk.errors import CacheCorruptError

MISSING_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.25, 0.5)
ENTROPY_EDGES = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0)  # nats


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts of a cache; ``as_dict`` is what ``topkd cache stats --json`` prints."""

    path: str
    records: int  # scores and rollouts on the disk
    live: int  # records that can answer a request
    scores: int
    rollouts: int
    tokens: int  # scored positions and sampled tokens of live records
    bytes: int
    bytes_per_token: float | None
    segments: int
    sealed: int
    k: dict[int, int]  # requested K -> number of live scores
    rows: dict[str, float]  # scored positions of a live score: min, median, mean, p99, max
    codecs: dict[str, int]
    teachers: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Return plain types only."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of reading every byte. ``ok`` is False when acknowledged records may be lost."""

    path: str
    segments: int
    records: int
    duplicates: int  # records that another one replaces; harmless, and removed by a compaction
    tokens: int  # as in ``CacheStats``, of undamaged records
    bytes: int  # of segments and indexes, as in ``CacheStats``
    bytes_per_token: float | None  # as in ``CacheStats``
    damage: list[Damage] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no damage beyond what a crash leaves."""
        return not any(item.fatal for item in self.damage)

    def as_dict(self) -> dict[str, Any]:
        """Return plain types only."""
        return {**asdict(self), "ok": self.ok}


def stats(path: str | os.PathLike[str]) -> CacheStats:
    """Count records, tokens and bytes from the indexes, without reading payloads."""
    root = Path(path)
    with open_tables(root) as (segments, table):
        answers = select_answer_rows(table)
        live = answers[find_live_rows(answers)]
        scores = live[live["kind"] == SCORE]
        tokens = int(live["rows"].sum(dtype=np.int64))
        size = count_bytes(root)
        names = read_teachers(segments, table)
        return CacheStats(
            path=str(root),
            records=len(answers),
            live=len(live),
            scores=len(scores),
            rollouts=int(live["start"][live["kind"] == ROLLOUT].sum(dtype=np.int64)),
            tokens=tokens,
            bytes=size,
            bytes_per_token=size / tokens if tokens else None,
            segments=len(segments),
            sealed=sum(segment.index is not None for segment in segments),
            k={int(k): int(n) for k, n in zip(*np.unique(scores["asked"], return_counts=True), strict=True)},
            rows=_spread(scores["rows"]),
            codecs={CODEC_NAMES.get(c, str(c)): n for c, n in Counter(live["codec"].tolist()).items()},
            teachers=[
                {
                    **asdict(names[tag]),
                    "records": int((live["tag"] == tag).sum()),
                    "tokens": int(live["rows"][live["tag"] == tag].sum(dtype=np.int64)),
                }
                for tag in sorted(names)
            ],
        )


def verify(path: str | os.PathLike[str]) -> Verification:
    """Read every byte of every segment and index; list each damaged part."""
    root = Path(path)
    open_folder(root, create=False)
    damage: list[Damage] = []
    rows: list[np.ndarray[Any, Any]] = []
    count = 0
    for position, file in enumerate(list_segments(root)):
        with contextlib.closing(Segment(file)) as segment:
            count += 1
            scan = segment.scan(payloads=True)
            if segment.index is not None:
                inside = [item for item in scan.damage if item.offset < segment.end]
                if not segment.damage:  # sealed and complete: an "incomplete last record" is a damaged one
                    inside = [
                        replace(item, what="damaged record", fatal=True) if item.what == TORN else item
                        for item in inside
                    ]
                damage += segment.damage + inside + _count_unindexed(segment, scan.found)
            else:
                busy = is_locked_by_writer(file)  # a record that is being written is not damage
                damage += segment.damage + [item for item in scan.damage if item.fatal or not busy]
            rows.append(tabulate_headers(position, scan.found))
    answers = select_answer_rows(concat_tables(rows))
    live = answers[find_live_rows(answers)]
    tokens, size = int(live["rows"].sum(dtype=np.int64)), count_bytes(root)
    return Verification(
        path=str(root), segments=count, records=len(answers), duplicates=len(answers) - len(live), tokens=tokens,
        bytes=size, bytes_per_token=size / tokens if tokens else None, damage=damage,
    )  # fmt: skip


def profile(path: str | os.PathLike[str], *, sample: int = 256, seed: int = 0) -> dict[str, Any]:
    """Compute distributions over a sample of live scores: mass in the lists, entropy bound, lengths.

    ``entropy`` is the lower bound in nats that the list gives (its entries, and the tail as one event). Quantiles are
    those in ``quantiles``; holes and unknown tails are counted and left out. ``histograms`` have the shares of
    ``missing`` mass (outside the lists), ``entropy`` and ``lengths`` between their edges, the last one open above.
    """
    quantiles = [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99]
    mass, entropy, holes, rows = [], [], 0, 0
    with open_tables(Path(path)) as (segments, table):
        answers = select_answer_rows(table)
        live = answers[find_live_rows(answers)]
        scores = live[live["kind"] == SCORE]
        chosen = np.random.default_rng(seed).permutation(len(scores))[:sample]
        for row in scores[np.sort(chosen)]:
            with contextlib.suppress(CacheCorruptError):  # verify reports it
                _, found = segments[int(row["segment"])].read(int(row["offset"])).score()
                signal = found.signal
                rows, holes = rows + found.rows, holes + int((~signal).sum())
                bins = np.concatenate([found.logp, found.tail_logp[:, None]], axis=1)[signal].astype(np.float64)
                mass.append(found.mass()[signal])
                bins = bins[~np.isnan(bins[:, -1])]
                p = np.exp(bins)
                entropy.append(-np.sum(p * np.where(p > 0, bins, 0.0), axis=1))
    lengths = scores["rows"].astype(np.float64)
    masses, entropies = _concat(mass), _concat(entropy)
    return {
        "scores": len(chosen),
        "rows": rows,
        "holes": holes,
        "quantiles": quantiles,
        "mass": _quantiles(masses, quantiles),
        "entropy": _quantiles(entropies, quantiles),
        "lengths": _quantiles(lengths, quantiles),
        "histograms": {
            "missing": _shares(np.maximum(1 - masses, 0), MISSING_EDGES),
            "entropy": _shares(entropies, ENTROPY_EDGES),
            "lengths": _shares(lengths, _edges(lengths)),
        },
    }


def _concat(parts: list[Any]) -> np.ndarray[Any, Any]:
    return np.concatenate(parts) if parts else np.zeros(0)


def _quantiles(values: np.ndarray[Any, Any], quantiles: list[float]) -> list[float]:
    return [float(value) for value in np.quantile(values, quantiles)] if values.size else []


def _shares(values: np.ndarray[Any, Any], edges: Sequence[float]) -> dict[str, list[float]]:
    """Compute the share of values in each bin [edge, next edge); the first bin takes smaller values too."""
    if not values.size:
        return {"edges": list(edges), "shares": []}
    counts = np.bincount(np.maximum(np.searchsorted(edges, values, "right") - 1, 0), minlength=len(edges))
    return {"edges": list(edges), "shares": [float(count) for count in counts / values.size]}


def _edges(lengths: np.ndarray[Any, Any]) -> list[float]:
    """Choose eight bins from shortest to longest, or powers of two if the lengths differ much."""
    if not lengths.size:
        return []
    low, high = max(lengths.min(), 1.0), lengths.max() + 1.0
    doubling = 2.0 ** np.arange(np.floor(np.log2(low)), np.log2(high))
    spread = doubling if high > 4 * low else np.linspace(low, high, 9)
    return [float(edge) for edge in np.unique(np.floor(spread)) if edge <= lengths.max()]


def _count_unindexed(segment: Segment, found: list[tuple[int, Header]]) -> list[Damage]:
    index = segment.index
    assert index is not None  # noqa: S101 - only called for sealed segments
    known = set(index.entries["offset"].tolist())
    return [
        Damage(segment.name, offset, header.span, f"{KIND_NAMES.get(header.kind, 'unknown')} record not in the index")
        for offset, header in found
        if offset not in known and offset < segment.end
    ]


def _spread(rows: np.ndarray[Any, Any]) -> dict[str, float]:
    if not len(rows):
        return {}
    values = rows.astype(np.float64)
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "p99": float(np.percentile(values, 99)),
        "max": float(values.max()),
    }
