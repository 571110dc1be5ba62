"""Unpacking of packed lists in one pass, compiled by numba where installed (``pip install topkd[fast]``).

Bit for bit what ``codecs`` makes with NumPy, in a third of the time. Loading the compiler costs a second, so it is not
loaded before a process has unpacked enough to win that back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from topkd.topk.types import Float32, Int32

WORTH_IT = 1 << 25  # entries unpacked by NumPy (about a second's worth) before the compiler is loaded
_SMALL = 4096  # entries below which NumPy is as fast

Array: TypeAlias = np.ndarray[Any, Any]
Kernel: TypeAlias = Callable[[Array, Array, Array, Array, Array], None]


class Unpacker:
    """Counts what NumPy had to do, and takes over when it has become much."""

    def __init__(self, worth_it: int = WORTH_IT) -> None:
        self._left = worth_it

    def lists(self, low: Array, high: Array, bits: Array) -> tuple[Int32, Float32] | None:
        """Unpack lists with 2 high bits and plain logprobs; None leaves it to NumPy.

        Args:
            low: u16, low halves of the ids.
            high: u8, four high parts a byte.
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
    """Compile the loop; None where numba is missing or refuses this NumPy."""
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
    # The exponent's bias moves from 15 to 127; below 2^-14 a float16 has no leading one, and is its fraction alone.
    for i in range(len(bits)):
        magnitude = np.uint32(bits[i]) & np.uint32(0x7FFF)
        wide = np.uint32((magnitude << np.uint32(13)) + np.uint32(0xB8000000)).view(np.float32)
        logp[i] = wide if magnitude >= np.uint32(0x400) else np.float32(np.int32(magnitude)) * np.float32(-(2.0**-24))
