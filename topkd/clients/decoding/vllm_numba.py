"""The same rows by one pass over the bytes, compiled by numba where it is installed (``pip install topkd[fast]``).

Stricter than ``vllm_numpy``: every byte between the entries is read, ranks may stand in any order, ids may have nine
digits. It hands over (None) in the same cases: whatever is not the compact form that vLLM writes. What both read, they
read to the same bits, so that it does not matter which of them a process has come to.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topkd.clients.decoding.checks import Ranked
from topkd.clients.decoding.vllm_numpy import read_odd_number
from topkd.topk.types import Int32

_START = b'"prompt_logprobs":['
_KEY = np.frombuffer(b'":{"logprob":', dtype=np.uint8)
_RANK = np.frombuffer(b',"rank":', dtype=np.uint8)
_TOKEN = np.frombuffer(b',"decoded_token":', dtype=np.uint8)
_POW10 = 10.0 ** np.arange(23)  # exact in float64, all of them
_INT_POW10 = 10 ** np.arange(9)


@functools.cache
def available() -> bool:
    """Check that numba is installed and fits the NumPy beside it."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("numba")
    except (ImportError, AttributeError, SystemError):  # it refuses a NumPy newer than it knows
        return False
    return True


def read_rows_compiled(body: bytes, ids: Int32, start: int, k: int) -> tuple[Ranked, bytes] | None:
    """Read rows, as ``vllm_numpy.read_rows``."""
    first = body.find(_START)
    if first < 0 or k < 1 or body[first + len(_START) :][:6] != b"null,{":
        return None
    rows = ids.size - 1 - start
    tokens = np.full((rows, k), -1, dtype=np.int32)
    logp = np.empty((rows, k), dtype=np.float64)
    actual_logp = np.full(rows, np.nan)
    extra = np.zeros(rows, dtype=np.bool_)
    odd = np.empty((rows * (k + 1), 3), dtype=np.int64)
    buffer = np.frombuffer(body, dtype=np.uint8)
    begin = first + len(_START) + 5
    end, count = load_reader()(buffer, begin, ids, tokens, logp, actual_logp, extra, odd)
    if end < 0 or body.find(_START, end) >= 0:
        return None
    for row, rank, at in odd[:count].tolist():
        value = read_odd_number(body, at)[0]
        if rank <= k:
            logp[row, rank - 1] = value
        if rank > k or tokens[row, rank - 1] == ids[start + 1 + row]:
            actual_logp[row] = value
    return Ranked(tokens, logp, actual_logp, extra), body[: first + len(_START) - 1] + b"null" + body[end:]


@functools.cache
def load_reader() -> Callable[..., Any]:
    """Compile the pass (once a machine, then read from numba's cache)."""
    import numba

    # It writes only to its own arrays and holds no Python object: other threads go on meanwhile.
    try:
        return numba.njit(nogil=True, cache=True)(_pass)  # type: ignore[no-any-return]
    except RuntimeError:  # no folder to cache in: compiled once per process instead
        return numba.njit(nogil=True)(_pass)  # type: ignore[no-any-return]


def _pass(  # noqa: C901, PLR0911, PLR0912, PLR0915, PLR0917 - one loop without calls: what the compiler turns into a fast one
    b: NDArray[np.uint8],
    pos: int,
    ids: Int32,
    tokens: Int32,
    logp: NDArray[np.float64],
    actual_logp: NDArray[np.float64],
    extra: NDArray[np.bool_],
    odd: NDArray[np.int64],
) -> tuple[int, int]:
    """Fill the arrays; return the offset behind the ``]`` of the rows (-1: anything unusual) and the count of ``odd``.

    A number is read as ``vllm_numpy`` reads it, operation for operation: eight decimals, the next eight, the digits
    before the point. Those of another form are odd: ``odd`` gets their row, rank and offset.
    """
    n_odd = 0
    k = tokens.shape[1]
    last = b.size - 64
    count_rows = ids.size - 1
    start = count_rows - tokens.shape[0]
    for row in range(count_rows):
        out = row - start
        actual = ids[row + 1]
        entries = 0
        found = False
        over = False
        if pos > last or b[pos] != 123:  # {
            return -1, 0
        pos += 1
        while True:
            if pos > last or b[pos] != 34:  # "
                return -1, 0
            pos += 1
            token = 0
            digits = pos
            while 48 <= b[pos] <= 57 and pos - digits < 10:
                token = token * 10 + (b[pos] - 48)
                pos += 1
            digits = pos - digits
            if digits < 1 or digits > 9:
                return -1, 0
            for i in range(13):
                if b[pos + i] != _KEY[i]:
                    return -1, 0
            pos += 13
            negative = b[pos] == 45  # -
            if negative:
                pos += 1
            number = pos
            whole, high, low = np.int64(0), np.int64(0), np.int64(0)
            while 48 <= b[pos] <= 57 and pos - number < 6:
                whole = whole * 10 + (b[pos] - 48)
                pos += 1
            digits = pos - number
            if digits < 1 or digits > 5 or (digits > 1 and b[number] == 48):
                return -1, 0
            is_odd = not negative or digits > 2 or b[pos] != 46
            if b[pos] == 46:  # .
                pos += 1
                digits = pos
                while 48 <= b[pos] <= 57 and pos - digits < 24:
                    if pos - digits < 8:
                        high = high * 10 + (b[pos] - 48)
                    elif pos - digits < 16:
                        low = low * 10 + (b[pos] - 48)
                    pos += 1
                fraction = pos - digits
                if fraction == 0:
                    return -1, 0
                if fraction < 8:
                    high *= _INT_POW10[8 - fraction]
                elif fraction < 16:
                    low *= _INT_POW10[16 - fraction]
            value = np.float64(low) * 1e-16
            value += np.float64(high) * 1e-8
            value += np.float64(whole)
            if b[pos] == 101:  # e
                is_odd = True
                pos += 1
                if b[pos] != 45:  # only small numbers are written so
                    return -1, 0
                pos += 1
                exponent = 0
                digits = pos
                while 48 <= b[pos] <= 57 and pos - digits < 3:
                    exponent = exponent * 10 + (b[pos] - 48)
                    pos += 1
                if pos == digits or exponent > 45:  # the smallest float32 is 1.4e-45
                    return -1, 0
                while exponent > 22:  # the largest power of ten that a float64 holds exactly
                    value /= _POW10[22]
                    exponent -= 22
                value /= _POW10[exponent]
            if negative:
                value = -value
            if pos > last:
                return -1, 0
            for i in range(8):
                if b[pos + i] != _RANK[i]:
                    return -1, 0
            pos += 8
            rank = 0
            digits = pos
            while 48 <= b[pos] <= 57 and pos - digits < 10:
                rank = rank * 10 + (b[pos] - 48)
                pos += 1
            digits = pos - digits
            if digits < 1 or digits > 9 or rank < 1:
                return -1, 0
            if b[pos] == 44:  # ,
                for i in range(17):
                    if b[pos + i] != _TOKEN[i]:
                        return -1, 0
                pos += 17
                if b[pos] == 34:
                    pos += 1
                    while pos <= last and b[pos] != 34:
                        if b[pos] < 32:  # a raw control character: no JSON
                            return -1, 0
                        pos += 2 if b[pos] == 92 else 1
                    if pos > last:
                        return -1, 0
                    pos += 1
                elif b[pos] == 110 and b[pos + 1] == 117 and b[pos + 2] == 108 and b[pos + 3] == 108:  # null
                    pos += 4
                else:
                    return -1, 0
            if b[pos] != 125:  # }
                return -1, 0
            pos += 1
            entries += 1
            is_actual = token == actual
            if is_actual:
                if found:
                    return -1, 0
                found = True
            if rank <= k:
                if out >= 0:
                    if tokens[out, rank - 1] != -1:
                        return -1, 0
                    tokens[out, rank - 1] = token
                    logp[out, rank - 1] = value
            elif over or not is_actual:
                return -1, 0
            else:
                over = True
            if is_odd and out >= 0:
                odd[n_odd, 0], odd[n_odd, 1], odd[n_odd, 2] = out, rank, number - negative
                n_odd += 1
            if is_actual and out >= 0:
                actual_logp[out] = value
                extra[out] = rank > k
            if b[pos] == 44:
                pos += 1
                continue
            if b[pos] != 125:
                return -1, 0
            pos += 1
            break
        if not found or entries != k + (1 if over else 0):
            return -1, 0
        if over and out >= 0 and actual_logp[out] > logp[out, k - 1]:
            return -1, 0
        if row + 1 < count_rows:
            if b[pos] != 44:
                return -1, 0
            pos += 1
    if pos > last or b[pos] != 93:  # ]
        return -1, 0
    return pos + 1, n_odd
