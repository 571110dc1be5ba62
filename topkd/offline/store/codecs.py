"""Encoding of scores: raw (exact), packed (18-bit ids, fp16 logprobs) or cold (packed, then zstd).

The realised tokens' logprobs, the tail mass and every id are exact in all three; packed and cold round only the lists'
logprobs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from topkd.topk.errors import CacheCorruptError
from topkd.topk.types import MASS_TOLERANCE, PAD_ID, Float32, Int32, TopK

CodecName: TypeAlias = Literal["raw", "packed", "cold"]
CODECS: dict[CodecName, int] = {"raw": 0, "packed": 1, "cold": 2}
CODEC_NAMES: dict[int, CodecName] = {number: name for name, number in CODECS.items()}

ACTUAL_IS_NEXT = 1  # flag: actual_ids are the sequence's next tokens, and are not stored again
HAS_PADS = 2  # flag: the lists hold -1
PLAIN = 4  # flag: all fp16 logprobs in lists are finite with the sign bit set: no table is needed

_HIGH_BITS = (0, 2, 8, 16)  # bits of an id above the low 16; the widest also holds -1 as all ones
_GUARD = 0.9 * MASS_TOLERANCE  # a row whose rounded mass exceeds this is rounded down, to stay a valid TopK
_LEVEL = 3
_MINUS_ZERO, _MINUS_INFINITY = np.uint16(0x8000), np.uint16(0xFC00)  # as fp16 bit patterns
_ONE_LEADING = np.uint16(0x8400)  # negative patterns from here on are normal numbers

# One byte of the 2-bit plane to four int32 with the bits in place; complex128 because NumPy gathers 16-byte items fast.
_FOUR = ((np.arange(256)[:, None] >> np.array([0, 2, 4, 6])) & 3).astype("<i4") << 16
_FOUR_WIDE = np.ascontiguousarray(_FOUR, dtype="<i4").reshape(-1).view(np.complex128)
_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
_local = threading.local()
# numba (``pip install topkd[fast]``) compiles the unpacking of lists: the same bits in a third of the time.
# Loading numba takes a second, so it is loaded only in a process that unpacks enough to gain from it.
WORTH_IT = 1 << 25  # entries that NumPy unpacks first: about a second of work
_SMALL = 4096  # entries below which NumPy is as fast

Array: TypeAlias = np.ndarray[Any, Any]
Kernel: TypeAlias = Callable[[Array, Array, Array, Array, Array], None]


class Unpacker:
    """Unpack lists in compiled code, once NumPy has unpacked ``worth_it`` entries."""

    def __init__(self, worth_it: int = WORTH_IT) -> None:
        self._left = worth_it

    def lists(self, low: Array, high: Array, bits: Array) -> tuple[Int32, Float32] | None:
        """Unpack lists with 2 high bits and plain logprobs; return None to leave it to NumPy.

        Args:
            low: u16, low halves of the ids.
            high: u8, four high parts per byte.
            bits: u16, float16 patterns, finite and with the sign bit set.
        """
        if low.size < _SMALL or low.size % 4:
            return None
        if self._left > 0:
            self._left -= low.size
            return None
        unpack = load_unpacker()
        if unpack is None:
            return None
        ids, logp = np.empty(low.size, np.int32), np.empty(low.size, np.float32)
        unpack(low, high, bits, ids, logp)
        return ids, logp


@functools.cache
def load_unpacker() -> Kernel | None:
    """Compile the loop; return None if numba is missing or does not support this NumPy."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        numba = importlib.import_module("numba")
    except (ImportError, AttributeError, SystemError):
        return None
    return numba.njit(_unpack, cache=True, nogil=True, boundscheck=False)  # type: ignore[no-any-return]


def _unpack(low: Array, high: Array, bits: Array, ids: Array, logp: Array) -> None:
    for four in range(len(high)):
        above, first = np.int32(high[four]), 4 * four
        ids[first] = low[first] | (above & 3) << 16
        ids[first + 1] = low[first + 1] | (above & 12) << 14
        ids[first + 2] = low[first + 2] | (above & 48) << 12
        ids[first + 3] = low[first + 3] | (above & 192) << 10
    # The exponent's bias changes from 15 to 127; below 2^-14 a float16 is denormal: its value is its fraction alone.
    for i in range(len(bits)):
        magnitude = np.uint32(bits[i]) & np.uint32(0x7FFF)
        wide = np.uint32((magnitude << np.uint32(13)) + np.uint32(0xB8000000)).view(np.float32)
        logp[i] = wide if magnitude >= np.uint32(0x400) else np.float32(np.int32(magnitude)) * np.float32(-(2.0**-24))


unpacker = Unpacker()


class Shape(NamedTuple):
    """The fields of a record header that describe its payload."""

    codec: int
    high_bits: int
    flags: int
    start: int
    rows: int
    width: int

    @property
    def tokens(self) -> int:
        """Length of the scored sequence: rows always reach to its end."""
        return self.start + 1 + self.rows


def encode(ids: Int32, scores: TopK, codec: CodecName) -> tuple[Shape, bytes]:
    """Encode a score; return its header fields and payload. A list that fp16 cannot hold is written raw."""
    number = CODECS[codec]
    half = None
    if number:
        half = _to_half(scores.logp)
        if half is None:
            number = 0
    largest = max(int(ids.max(initial=0)), int(scores.ids.max(initial=0)))
    high = next(bits for bits in _HIGH_BITS if bits == _HIGH_BITS[-1] or largest < (1 << (16 + bits)) - 1)
    flags = HAS_PADS if scores.ids.size and scores.ids.min() < 0 else 0
    derived = bool(np.array_equal(scores.actual_ids, ids[scores.start + 1 :]))
    flags |= ACTUAL_IS_NEXT if derived else 0
    if half is not None and half.size:
        bits = half.view("<u2")
        flags |= PLAIN if bits.min() >= _MINUS_ZERO and bits.max() < _MINUS_INFINITY else 0
    shape = Shape(number, high if number else 0, flags, scores.start, scores.rows, scores.k)
    own = [] if derived else [_le(scores.actual_ids, "<i4")]
    exact = [_le(scores.actual_logp, "<f4"), _le(scores.tail_logp, "<f4")]
    if half is None:
        parts = [_le(ids, "<i4"), *own, *exact, _le(scores.ids, "<i4"), _le(scores.logp, "<f4")]
        return shape, b"".join(parts)
    sequence_low, sequence_high = _split(ids, high)
    low, above = _split(scores.ids, high)
    bits = half.view("<u2")
    if codec == "packed":
        return shape, b"".join(
            [*exact, *own, sequence_low.tobytes(), low.tobytes(), bits.tobytes(), sequence_high, above]
        )
    steps = bits.copy()
    steps[:, 1:] -= bits[:, :-1]  # descending logprobs: fp16 bit patterns that climb in small steps (modulo 2**16)
    planes = [_planes(np.frombuffer(part, np.uint8), 4) for part in exact]
    planes += [*own, sequence_low.tobytes(), _planes(low.view(np.uint8), 2), _planes(steps.view(np.uint8), 2)]
    return shape, _compressor().compress(b"".join([*planes, sequence_high, above]))


def decode(shape: Shape, payload: memoryview) -> tuple[Int32, TopK]:
    """Decode a payload to the sequence and its scores, as read-only arrays; the raw codec's are views of the payload.

    The payload must have passed its checksum: a score was validated when it was written, and is not validated again.
    """
    rows, width, tokens = shape.rows, shape.width, shape.tokens
    listed = rows * width
    derived = bool(shape.flags & ACTUAL_IS_NEXT)
    if shape.codec == CODECS["cold"]:
        payload = _inflate(shape, payload)
    raw = shape.codec == CODECS["raw"]
    own = 0 if derived else rows
    order: tuple[tuple[str, int], ...] = (
        ("<i4", tokens),
        ("<i4", own),
        ("<f4", rows),
        ("<f4", rows),
        ("<i4", listed),
        ("<f4", listed),
    )
    if not raw:
        high = shape.high_bits
        order = (("<f4", rows), ("<f4", rows), ("<i4", own), ("<u2", tokens), ("<u2", listed), ("<u2", listed),
                 ("u1", _high_size(tokens, high)), ("u1", _high_size(listed, high)))  # fmt: skip
    arrays = _cut(payload, order)
    if raw:
        ids, stored, actual_logp, tail, list_ids, logp = arrays
    else:
        actual_logp, tail, stored, sequence_low, low, bits, sequence_above, above = arrays
        ids = _join(sequence_low, sequence_above, high)
        list_ids, logp = _lists(low, above, bits, shape)
    actual_ids = ids[shape.start + 1 :] if derived else stored
    return ids, make_unchecked_topk(
        shape.start, list_ids.reshape(rows, width), logp.reshape(rows, width), actual_ids, actual_logp, tail
    )


def _lists(
    low: NDArray[np.uint16], above: NDArray[np.uint8], bits: NDArray[np.uint16], shape: Shape
) -> tuple[Int32, Float32]:
    plain = bool(shape.flags & PLAIN)
    if plain and shape.high_bits == 2 and not shape.flags & HAS_PADS:
        found = unpacker.lists(low, above, bits)
        if found is not None:
            return found
    ids = _join(low, above, shape.high_bits)
    if shape.flags & HAS_PADS:
        ids[ids == (1 << (16 + shape.high_bits)) - 1] = PAD_ID
    return ids, _from_half(bits, plain=plain)


def make_unchecked_topk(  # noqa: PLR0917 - the fields of TopK, in their order
    start: int, ids: Int32, logp: Float32, actual_ids: Int32, actual_logp: Float32, tail: Float32
) -> TopK:
    """Make a TopK without its constructor's checks, from values that passed them before.

    The checks cost several times what decoding does.
    """
    scores = object.__new__(TopK)
    fields = {"ids": ids, "logp": logp, "actual_ids": actual_ids, "actual_logp": actual_logp, "tail_logp": tail}
    object.__setattr__(scores, "start", start)
    for name, array in fields.items():
        if array.flags.writeable:
            array.flags.writeable = False
        object.__setattr__(scores, name, array)
    return scores


def narrow_scores(scores: TopK, start: int, k: int) -> TopK:
    """Return only the rows from ``start`` on and k columns; add the dropped mass to the tail."""
    skip = start - scores.start
    if k < scores.k:
        if k:
            return scores.slice(slice(skip, None), k=k)
        # All mass is outside an empty list: log 1. A row with an unknown tail stays unknown.
        tail = np.where(np.isnan(scores.tail_logp[skip:]), np.nan, 0.0).astype(np.float32)
        lists = (np.empty((tail.size, 0), np.int32), np.empty((tail.size, 0), np.float32))
        return make_unchecked_topk(start, *lists, scores.actual_ids[skip:], scores.actual_logp[skip:], tail)
    if not skip:
        return scores
    lists = (scores.ids[skip:], scores.logp[skip:])
    return make_unchecked_topk(
        start, *lists, scores.actual_ids[skip:], scores.actual_logp[skip:], scores.tail_logp[skip:]
    )


def _to_half(logp: Float32) -> NDArray[np.float16] | None:
    """Round logprobs to fp16 so that they stay a valid TopK; None if fp16 cannot hold one (below -65504).

    Round to nearest, or downwards where a row's rounded mass or maximum would be near the tolerance. Both keep the
    order, and rounding downwards never adds mass.
    """
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(logp).astype("<f2")
    back = half.astype(np.float32)
    if np.isinf(back).any() and not np.array_equal(np.isinf(back), np.isinf(logp)):
        return None
    if logp.shape[1]:
        heavy = (np.exp(back).sum(axis=1) > 1 + _GUARD) | (back[:, 0] > _GUARD)
        if heavy.any():
            rows = half[heavy]
            down = np.nextafter(rows, np.float16(-np.inf))
            half[heavy] = np.where(back[heavy] > logp[heavy], down, rows)
    bits = half.view(np.uint16)
    bits[bits == 0] = _MINUS_ZERO  # log 1 too; when all have one sign, decoding needs no table
    return half


def _from_half(bits: NDArray[np.uint16], *, plain: bool) -> Float32:
    if not plain:
        return _HALF.take(bits, mode="clip")  # no index is out of range, and "clip" skips that check
    # Shift exponent and fraction, and change the bias from 15 to 127: half the time of a table look-up. No float
    # arithmetic: the smallest values would be denormal on the way, which is a hundred times slower.
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(13)
    wide += np.uint32(0xA8000000)
    logp: Float32 = wide.view(np.float32)
    if bits.size and np.minimum.reduce(bits) < _ONE_LEADING:  # takes half the time of searching
        at = np.flatnonzero(bits < _ONE_LEADING)
        logp[at] = (bits[at] & np.uint16(0x3FF)) * np.float32(-(2.0**-24))
    return logp


def _split(ids: Int32, high_bits: int) -> tuple[NDArray[np.uint16], bytes]:
    flat = np.ascontiguousarray(ids).reshape(-1).view(np.uint32)
    low = flat.astype("<u2")
    if high_bits == 0:
        return low, b""
    above = flat >> np.uint32(16)
    if high_bits == 2:
        padded = np.zeros(-(-flat.size // 4) * 4, np.uint8)
        padded[: flat.size] = above & 3
        four = padded.reshape(-1, 4)
        return low, (four[:, 0] | four[:, 1] << 2 | four[:, 2] << 4 | four[:, 3] << 6).tobytes()
    return low, above.astype("<u2" if high_bits == 16 else "u1").tobytes()


def _join(low: NDArray[np.uint16], high: NDArray[np.uint8], high_bits: int) -> Int32:
    if high_bits == 0:
        return low.astype(np.int32)
    if high_bits == 2:
        ids: Int32 = _FOUR_WIDE.take(high, mode="clip").view(np.int32)[: low.size]
    else:
        ids = (high.view("<u2") if high_bits == 16 else high).astype(np.int32) << 16
    return np.bitwise_or(ids, low, out=ids)


def _high_size(entries: int, high_bits: int) -> int:
    return -(-entries * high_bits // 8)


def _planes(items: NDArray[np.uint8], size: int) -> bytes:
    return np.ascontiguousarray(items.reshape(items.size // size, size).T).tobytes()


def _inflate(shape: Shape, payload: memoryview) -> memoryview:
    rows, listed, tokens = shape.rows, shape.rows * shape.width, shape.tokens
    own = 0 if shape.flags & ACTUAL_IS_NEXT else 4 * rows
    high = _high_size(tokens, shape.high_bits) + _high_size(listed, shape.high_bits)
    size = 8 * rows + own + 2 * tokens + 4 * listed + high
    try:
        flat = np.frombuffer(_decompressor().decompress(payload, max_output_size=size or 1), np.uint8)
    except zstandard.ZstdError as error:
        raise CacheCorruptError("a cold record does not decompress", got=str(error)) from error
    if flat.size != size:
        raise CacheCorruptError("a cold record has the wrong size", got=flat.size, expected=size)
    out = np.empty(size, np.uint8)
    position = 0

    def copy(count: int, planes: int = 1) -> NDArray[np.uint8]:
        nonlocal position
        target = out[position : position + count]
        items = count // planes
        target.reshape(items, planes)[...] = flat[position : position + count].reshape(planes, items).T
        position += count
        return target

    for count, planes in ((4 * rows, 4), (4 * rows, 4), (own + 2 * tokens, 1), (2 * listed, 2)):
        copy(count, planes)
    steps = copy(2 * listed, 2).view("<u2").reshape(rows, shape.width)
    np.add.accumulate(steps, axis=1, dtype=np.uint16, out=steps)
    copy(high)
    return out.data


def _cut(payload: memoryview, order: Sequence[tuple[str, int]]) -> list[NDArray[Any]]:
    """Split a payload into consecutive arrays; raise CacheCorruptError if its length is wrong."""
    arrays, position = [], 0
    try:
        for dtype, count in order:
            array: NDArray[Any] = np.frombuffer(payload, dtype, count, position)
            arrays.append(array)
            position += array.nbytes
    except ValueError as error:
        raise CacheCorruptError("a record is shorter than its header says", got=len(payload)) from error
    if position != len(payload):
        raise CacheCorruptError("a record is longer than its header says", got=len(payload), expected=position)
    return arrays


def _le(array: NDArray[Any], dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def _compressor() -> zstandard.ZstdCompressor:
    # Contexts are not thread-safe, and making one costs more than a small record.
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
    found: zstandard.ZstdCompressor = _local.compressor
    return found


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    found: zstandard.ZstdDecompressor = _local.decompressor
    return found
