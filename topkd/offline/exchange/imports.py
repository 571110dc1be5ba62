"""Import of captures made by other tools: Axolotl's KD columns and DistillKit's Parquet (docs/format.md).

Both may hold numbers that are not the teacher's own softmax (renormalised lists, a polynomial in place of a tail). The
``semantics`` field of the teacher's identity records this, so that such records never answer a request for raw
logprobs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topkd.offline.exchange.exchange import Exchange, keep_each
from topkd.offline.exchange.parquet_files import open_parquet, read_batches
from topkd.offline.store.keys import RAW_LOGPROBS, TeacherIdentity, check_token_array
from topkd.offline.store.store import ScoreStore
from topkd.topk.errors import AlignmentError, ConfigError, DataError, TopkdError
from topkd.topk.types import PAD_ID, Float32, Int32, TopK, tail_logp

_HEAD, _ENOUGH = 64, 64  # rows read, and positions needed, to detect a shift
CONFIG_FILE = "compression_config.yaml"
_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_RESCALED = 1.01  # rounding explains a mass up to this; a list above it is no distribution


@dataclass(frozen=True, slots=True)
class _Lists:
    """One captured row: lists [R, K], where they start, and whether the tail can be computed from them."""

    ids: Int32
    start: int
    top: NDArray[np.int64]
    logp: NDArray[np.float64]
    exact: bool


def import_axolotl(
    rows: Iterable[Mapping[str, Any]],
    store: ScoreStore,
    teacher: TeacherIdentity,
    *,
    logprobs_field: str = "logprobs",
    tokenise: Callable[[Mapping[str, Any]], Any] | None = None,
    temperature: float = 1.0,
    shifted: bool = True,
    where: str = "",
) -> Exchange:
    """Import Axolotl's KD columns: raw logprobs, structured logprobs, or prepared ``target_*`` columns.

    Args:
        rows: Data rows with ``input_ids`` (or with what ``tokenise`` needs).
        store: Open for appending.
        teacher: The teacher that scored them. Prepared columns, or scores at a temperature other than 1, are stored
            under another ``semantics``.
        logprobs_field: The column of raw logprobs; its last entry is about the last token.
        tokenise: Returns a row's ids, where ``input_ids`` is missing.
        temperature: The temperature of the logprobs.
        shifted: For prepared columns: row j is about token j + 1 (as documented); False: about token j.
        where: What to call the source in messages.
    """

    def read(row: Mapping[str, Any]) -> _Lists:
        settings = row["input_ids"] if "input_ids" in row else tokenise(row) if tokenise else None
        if settings is None:
            raise DataError("the row has no input_ids", hint="pass tokenise=, a function from a row to its token ids")
        ids = check_token_array(settings)
        if "target_logprobs" in row:
            return _prepare_rows(row, ids, shifted=shifted)
        if logprobs_field not in row:
            raise DataError("the row has no logprobs", got=", ".join(row), expected=logprobs_field)
        return _read_raw_rows(row[logprobs_field], row.get("target_token_ids"), ids)

    def semantics(row: Mapping[str, Any]) -> str:
        kind = "renormalised_topk" if "target_logprobs" in row else RAW_LOGPROBS
        return kind if temperature == 1.0 else f"{kind};temperature={temperature:g}"

    return _import_captured(rows, store, teacher, read, semantics, where=where)


def import_distillkit(
    path: str | os.PathLike[str],
    store: ScoreStore,
    teacher: TeacherIdentity,
    *,
    config: Mapping[str, Any] | None = None,
) -> Exchange:
    """Import a DistillKit capture: ``data_*.parquet`` beside ``compression_config.yaml``; row i is about token i + 1.

    Args:
        path: The folder, or one Parquet file.
        store: Open for appending.
        teacher: The teacher that scored it. Scores of a lossy capture are stored under another ``semantics``.
        config: The compression settings, where the YAML file is not beside the data.
    """
    root = Path(path)
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
    if not files or not files[0].is_file():
        raise DataError("no Parquet capture there", where=str(root))
    layout = DistillKitLayout.load(config, root if root.is_dir() else root.parent)

    def rows() -> Iterable[Mapping[str, Any]]:
        for file in files:
            with open_parquet(file) as source:
                for batch in read_batches(source, file, batch_size=64):
                    yield from batch.to_pylist()

    def read(row: Mapping[str, Any]) -> _Lists:
        ids = check_token_array(row["input_ids"])
        if "packed_indices" in row:
            raise DataError("DistillKit's legacy layout cannot be read", got="packed_indices", hint="capture again")
        if "top_values" in row:
            top, logp = np.asarray(row["token_ids"], np.int64), np.asarray(row["top_values"], np.float64)
        else:
            top, logp = layout.decode(row["bytepacked_indices"], row["compressed_logprobs"])
        spare = len(logp) - (ids.size - 1)
        if spare > 0:  # captures may have a row about the token after the last one
            top, logp = top[:-spare], logp[:-spare]
        return _Lists(ids, 0, top, logp, layout.exact or "top_values" in row)

    def semantics(row: Mapping[str, Any]) -> str:
        return RAW_LOGPROBS if "top_values" in row else layout.semantics

    return _import_captured(rows(), store, teacher, read, semantics, where=str(root))


def _import_captured(
    rows: Iterable[Mapping[str, Any]],
    store: ScoreStore,
    teacher: TeacherIdentity,
    read: Callable[[Mapping[str, Any]], _Lists],
    semantics: Callable[[Mapping[str, Any]], str],
    *,
    where: str,
) -> Exchange:
    def keep(row: Mapping[str, Any]) -> int:
        lists = read(row)
        scores = _build_scores(lists)
        store.put(replace(teacher, semantics=semantics(row)), lists.ids, scores)
        return scores.rows

    source = iter(rows)
    head = list(islice(source, _HEAD))
    _check_alignment(head, read)
    return keep_each(enumerate(chain(head, source)), store, keep, where=where, what="captured row")


def _check_alignment(head: list[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], _Lists]) -> None:
    """Refuse a capture whose lists are shifted by one token."""
    hits, seen = np.zeros(3), 0
    for row in head:
        try:
            lists = read(row)
        except (TopkdError, KeyError, TypeError, ValueError, IndexError, OverflowError):
            continue  # reported when it is imported
        rows = len(lists.top)
        for place, shift in enumerate((-1, 0, 1)):
            at = np.arange(rows) + lists.start + 1 + shift
            inside = (at >= 0) & (at < lists.ids.size)
            wanted = np.where(inside, lists.ids[np.clip(at, 0, lists.ids.size - 1)], -2)
            hits[place] += ((lists.top == wanted[:, None]) & np.isfinite(lists.logp)).any(axis=1).sum()
        seen += rows
    if seen >= _ENOUGH and max(hits[0], hits[2]) > 1.5 * hits[1]:
        shift = -1 if hits[0] > hits[2] else 1
        raise AlignmentError(
            "the captured lists are shifted",
            got=f"{int(hits[1])} of {seen} hold the token they should predict, {int(hits.max())} the one at {shift:+d}",
            hint="check that ids and logprobs belong together (for Axolotl's prepared columns: shifted=)",
        )


def _read_raw_rows(captured: Any, structured: Any, ids: Int32) -> _Lists:
    """Read raw logprobs: the last entry is about the last token, and the first token has none."""
    entries = list(captured)[-(ids.size - 1) :] if ids.size > 1 else []
    named = None if structured is None else list(structured)[len(structured) - len(entries) :]
    rows: list[list[tuple[int, float]]] = []
    for number, entry in enumerate(entries):
        if entry is None:
            rows.append([])
        elif named is not None:
            rows.append([(_parse_id(t), float(v)) for t, v in zip(named[number], entry, strict=True)])
        else:
            rows.append([(int(str(each["token"]).removeprefix("token_id:")), float(each["logprob"])) for each in entry])
    top, logp = _pad_lists(rows)
    return _Lists(ids, ids.size - 1 - len(rows), top, logp, exact=True)


def _prepare_rows(row: Mapping[str, Any], ids: Int32, *, shifted: bool) -> _Lists:
    lists, tokens = row["target_logprobs"], row["target_token_ids"]
    mask = row.get("target_mask")
    if len(lists) != ids.size or len(tokens) != ids.size or (mask is not None and len(mask) != ids.size):
        raise AlignmentError("target columns are not as long as input_ids", got=len(lists), expected=ids.size)
    used = range(ids.size - 1) if shifted else range(1, ids.size)
    rows = [
        [
            (_parse_id(token), float(value))
            for column, (token, value) in enumerate(zip(tokens[at], lists[at], strict=True))
            if mask is None or mask[at][column]
        ]
        for at in used
    ]
    top, logp = _pad_lists(rows)
    return _Lists(ids, 0, top, logp, exact=False)


def _parse_id(token: Any) -> int:
    number = int(token)
    if not isinstance(token, str) and number != token:  # 1.5 must not become 1
        raise ValueError(f"token id {token} is not an integer")
    return number


def _pad_lists(rows: list[list[tuple[int, float]]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    width = max((len(row) for row in rows), default=0)
    top, logp = np.full((len(rows), width), PAD_ID, np.int64), np.full((len(rows), width), -np.inf)
    for number, row in enumerate(rows):
        if row:
            top[number, : len(row)], logp[number, : len(row)] = zip(*row, strict=True)
    return top, logp


def _build_scores(lists: _Lists) -> TopK:
    """Build a valid TopK; a row whose mass is too large for rounding becomes a hole."""
    logp = np.where(np.isnan(lists.logp) | (lists.top < 0), -np.inf, lists.logp)
    order = np.argsort(-logp, axis=1, kind="stable")
    top, logp = np.take_along_axis(lists.top, order, 1), np.take_along_axis(logp, order, 1)
    by_id = np.argsort(top, axis=1, kind="stable")  # stable: the larger logprob of a repeated id comes first
    again = np.zeros(top.shape, bool)
    ordered = np.take_along_axis(top, by_id, 1)
    np.put_along_axis(again, by_id[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    logp = np.where(again, -np.inf, logp)
    with np.errstate(over="ignore"):
        mass = np.exp(logp).sum(axis=1, keepdims=True)
    logp = np.where(mass > _RESCALED, -np.inf, np.where(mass > 1, logp - np.log(np.maximum(mass, 1)), logp))
    order = np.argsort(-logp, axis=1, kind="stable")
    top, logp = np.take_along_axis(top, order, 1), np.take_along_axis(logp, order, 1)
    unknown: Float32 = np.full(len(top), np.nan, np.float32)
    return TopK(
        lists.start,
        np.where(np.isneginf(logp), PAD_ID, top),
        logp.astype(np.float32),
        lists.ids[lists.start + 1 :],
        unknown,
        tail_logp(logp) if lists.exact else unknown,
    )


@dataclass(frozen=True, slots=True)
class DistillKitLayout:
    """The compression settings of a capture, as in its ``compression_config.yaml``."""

    vocabulary: int
    k: int
    exact_k: int
    exact_dtype: str
    terms: tuple[int | str, ...]
    term_dtype: str
    bins: tuple[tuple[str, int, int], ...]  # dtype of the scale, bits of an element, elements
    delta: bool
    unit_interval: bool

    @classmethod
    def load(cls, config: Mapping[str, Any] | None, folder: Path) -> DistillKitLayout:
        """Read the layout from settings, or from the YAML file beside the data."""
        if config is None:
            file = folder / CONFIG_FILE
            try:
                yaml = import_module("yaml")
            except ImportError as error:
                raise ConfigError("PyYAML is not installed", hint='pip install "topkd[data]"') from error
            try:
                config = dict(yaml.safe_load(file.read_text()))
            except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
                raise DataError("the DistillKit settings cannot be read", where=str(file)) from error
        try:
            return cls(
                vocabulary=int(config["d"]),
                k=int(config["k"]),
                exact_k=int(config["exact_k"]),
                exact_dtype=_dtype(config.get("exact_dtype", "float32")),
                terms=tuple(config.get("polynomial_terms") or ()),
                term_dtype=_dtype(config.get("term_dtype", "float32")),
                bins=tuple(
                    (_dtype(each["scale_dtype"]), int(each["element_bits"]), int(each["num_elements"]))
                    for each in config.get("residual_bins") or ()
                ),
                delta=bool(config.get("delta_encoding", True)),
                unit_interval=bool(config.get("normalize_t", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("not DistillKit compression settings", got=f"{type(error).__name__}: {error}") from error

    @property
    def exact(self) -> bool:
        """Whether the captured values are the server's unrounded values."""
        return self.exact_k == self.k and self.exact_dtype in {"float32", "float64"} and not self.delta

    @property
    def semantics(self) -> str:
        """Name of the meaning of the decoded numbers, for the teacher's identity."""
        if self.exact:
            return RAW_LOGPROBS
        residual = sum(elements for _, _, elements in self.bins)
        kept = f"exact={self.exact_k}/{self.k} {self.exact_dtype}"
        return f"distillkit_lossy;{kept};terms={len(self.terms)};residual={residual}"

    def decode(
        self, indices: Sequence[Sequence[int]], logprobs: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Decode ids [R, K] and log-probabilities [R, K] of one sequence."""
        packed = np.asarray(logprobs, np.uint8)
        if packed.ndim != 2 or len(indices) != len(logprobs):
            raise DataError("the positions of a DistillKit row differ in length")
        index_bits = math.ceil(math.log2(self.vocabulary))
        ids = _unpack(np.asarray(indices, np.uint8), index_bits, self.k)
        position = 0

        def take(dtype: str, count: int) -> NDArray[np.float64]:
            nonlocal position
            size = _WIDTHS[dtype] * count
            part = np.ascontiguousarray(packed[:, position : position + size])
            position += size
            return _floats(part, dtype)

        exact = take(self.exact_dtype, self.exact_k)
        rest = np.zeros((len(packed), self.k - self.exact_k))
        if self.terms:
            coefficients = take(self.term_dtype, len(self.terms))
            rest += coefficients @ _basis(self.terms, rest.shape[1], unit_interval=self.unit_interval).T
        column = 0
        for dtype, bits, elements in self.bins:
            scale = take(dtype, 1)
            size = -(-bits * elements // 8)
            steps = _unpack(packed[:, position : position + size], bits, elements)
            position += size
            signed = 2 * steps - 1 if bits == 1 else steps - (1 << (bits - 1))
            rest[:, column : column + elements] += signed * scale
            column += elements
        if position != packed.shape[1]:
            raise DataError("a DistillKit row does not fit its settings", got=f"{packed.shape[1]} bytes per position",
                            expected=position)  # fmt: skip
        values = np.concatenate([exact, rest], axis=1)
        return ids, np.cumsum(values, axis=1) if self.delta else values


def _dtype(name: Any) -> str:
    text = str(name)
    if text not in _WIDTHS:
        raise ValueError(text)
    return text


def _floats(block: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    if dtype == "bfloat16":
        return (block.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return block.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype]).astype(np.float64)


def _unpack(block: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Unpack ``count`` unsigned integers of ``bits`` bits per row, most significant bit first."""
    if block.ndim != 2 or block.shape[1] * 8 < bits * count:
        raise DataError("a DistillKit row is too short", got=block.shape[-1], expected=-(-bits * count // 8))
    each = np.unpackbits(block, axis=1)[:, : bits * count].reshape(len(block), count, bits)
    return np.asarray(each.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64)))


def _basis(terms: Sequence[int | str], count: int, *, unit_interval: bool) -> NDArray[np.float64]:
    points = np.linspace(0, 1, count) if unit_interval else np.arange(count, dtype=np.float64)
    named = {"sqrt": np.sqrt, "exp": np.exp}
    return np.stack([named[term](points) if isinstance(term, str) else points**term for term in terms], axis=-1)
