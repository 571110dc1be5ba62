"""Decoder of DistillKit's packed logprobs: exact head, polynomial, quantised residuals, bit-packed ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topkd.offline.store.keys import RAW_LOGPROBS
from topkd.topk.errors import ConfigError, DataError

CONFIG_FILE = "compression_config.yaml"
_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Layout:
    """The compression settings of a capture, as its ``compression_config.yaml`` names them."""

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
    def load(cls, config: Mapping[str, Any] | None, folder: Path) -> Layout:
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
                raise DataError("a DistillKit capture without its settings", where=str(file)) from error
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
        """True when the captured values are the server's, unrounded."""
        return self.exact_k == self.k and self.exact_dtype in {"float32", "float64"} and not self.delta

    @property
    def semantics(self) -> str:
        """What the decoded numbers are."""
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
            raise DataError("a DistillKit row whose positions differ in length")
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
            raise DataError("a DistillKit row does not fit its settings", got=f"{packed.shape[1]} bytes a position",
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
    """Unpack ``count`` unsigned integers of ``bits`` bits a row, most significant bit first."""
    if block.ndim != 2 or block.shape[1] * 8 < bits * count:
        raise DataError("a DistillKit row is too short", got=block.shape[-1], expected=-(-bits * count // 8))
    each = np.unpackbits(block, axis=1)[:, : bits * count].reshape(len(block), count, bits)
    return np.asarray(each.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64)))


def _basis(terms: Sequence[int | str], count: int, *, unit_interval: bool) -> NDArray[np.float64]:
    points = np.linspace(0, 1, count) if unit_interval else np.arange(count, dtype=np.float64)
    named = {"sqrt": np.sqrt, "exp": np.exp}
    return np.stack([named[term](points) if isinstance(term, str) else points**term for term in terms], axis=-1)
