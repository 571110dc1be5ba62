"""Binary replies to arrays, without a Python object an entry: ``.npy`` matrices and flat little-endian buffers.

The typed decoder has already turned base64 into bytes (a ``bytes`` field of a msgspec struct).
"""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topkd.topk.errors import AlignmentError, ResponseError
from topkd.topk.types import Float32, Int32

_MAGIC = b"\x93NUMPY"
_HEADER_LIMIT = 4096


def read_npy_matrix(raw: bytes, *, rows: int, k: int, what: str = "npy matrix") -> Float32:
    """Read float32 [rows, K] of a ``.npy`` buffer, a read-only view of it.

    Raises:
        ResponseError: no such buffer, another dtype, or NaN (-inf is probability zero and may be there).
        AlignmentError: another shape.
    """
    version = raw[6] if len(raw) > 10 and raw[:6] == _MAGIC else 0
    if version not in {1, 2, 3}:
        raise ResponseError(f"{what}: not a .npy buffer", got=f"{len(raw)} bytes, {raw[:8]!r}")
    width = 2 if version == 1 else 4
    body = 8 + width + int.from_bytes(raw[8 : 8 + width], "little")
    header = _read_header(raw[8 + width : body], body - 8 - width, what)
    if header.get("descr") != "<f4" or header.get("fortran_order") is not False:
        got = f"{header.get('descr')!r}, fortran_order {header.get('fortran_order')}"
        raise ResponseError(f"{what}: another dtype", got=got, expected="'<f4', fortran_order False")
    if header.get("shape") != (rows, k):
        raise AlignmentError(f"{what}: another shape", got=header.get("shape"), expected=(rows, k))
    return _read_logprobs(
        np.frombuffer(_check_whole(raw, body, rows * k * 4, what), dtype="<f4", offset=body), rows, k, what
    )


def read_flat_lists(
    values: bytes, indices: bytes, *, rows: int, k: int, what: str = "flat top-K"
) -> tuple[Int32, Float32]:
    """Read ids int32 [rows, K] and logprobs float32 [rows, K] of two flat little-endian buffers.

    Raises:
        AlignmentError: not ``rows * k`` entries.
        ResponseError: NaN, a value above 0, or a negative id.
    """
    size = rows * k * 4
    if len(values) != size or len(indices) != size:
        raise AlignmentError(
            f"{what}: wrong size", got=f"{len(values)} and {len(indices)} bytes", expected=f"{size} each"
        )
    ids = np.frombuffer(indices, dtype="<i4").reshape(rows, k)
    if ids.size and int(ids.min()) < 0:
        raise ResponseError(f"{what}: a negative token id", got=int(ids.min()))
    return ids, _read_logprobs(np.frombuffer(values, dtype="<f4"), rows, k, what)


def _read_header(text: bytes, announced: int, what: str) -> dict[str, Any]:
    if len(text) == announced <= _HEADER_LIMIT:
        try:
            header = ast.literal_eval(text.decode("latin-1").strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            header = None
        if isinstance(header, dict):
            return header
    raise ResponseError(
        f"{what}: the .npy header cannot be read", got=f"{announced} bytes announced, {len(text)} there"
    )


def _check_whole(raw: bytes, body: int, size: int, what: str) -> bytes:
    if len(raw) - body != size:
        raise AlignmentError(f"{what}: wrong size", got=f"{len(raw) - body} bytes of data", expected=size)
    return raw


def _read_logprobs(flat: NDArray[np.float32], rows: int, k: int, what: str) -> Float32:
    matrix = flat.reshape(rows, k)
    # One pass each, no mask array: NaN propagates through max.
    top = float(matrix.max(initial=-np.inf))
    if np.isnan(top) or top > 1e-3:
        raise ResponseError(f"{what}: a logprob is {'NaN' if np.isnan(top) else 'above 0'}", got=top, expected="<= 0")
    return matrix
