"""vLLM's ``prompt_logprobs`` JSON to arrays by reading eight bytes of every entry at once, in plain NumPy.

Sound because the bytes ``":{"logprob":`` cannot occur inside a JSON string (a quote in a string is escaped), so each
occurrence is an entry. Everything that the reading relies on is checked; ``read_rows`` returns None when a check fails,
and the typed decoder then gives the answer or the reason. It relies on the form that vLLM writes: compact JSON, keys in
the order logprob, rank, the realised token first and the rest by rank, ids of up to six digits.

A number is read to 16 decimals: closer than 1e-15 to the double in the text, so every float32 that a server wrote comes
back bit for bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from topkd.clients.decoding.checks import Ranked
from topkd.topk.types import Float64, Int32

_U64 = NDArray[np.uint64]
_I64 = NDArray[np.int64]

_SCAN_BYTES = 1 << 20  # of the reply searched at a time: the mask stays in the L2 cache
_CHUNK = 1 << 14  # entries worked on at a time, for the same reason
_MARGIN = 64  # bytes read beyond an entry's start; shorter replies are not worth a fast path
_START = b'"prompt_logprobs":['
_ENTRY_END = re.compile(rb',"rank":\d{1,9}(?:,"decoded_token":(?:null|"(?:[^"\\]|\\.)*"))?\}')
_JSON = msgspec.json.Decoder(msgspec.Raw)  # checks the whole text and builds nothing
_NUMBER = re.compile(rb'(-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?),"rank":')


def _word(text: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(text, "little"))


def _every(byte: int) -> np.uint64:
    return np.uint64(byte * 0x0101010101010101)


_KEY_HEAD, _KEY_TAIL = _word(b'":{"logp'), _word(b'ogprob":')
_RANK = _word(b',"rank":')
_NEXT_ENTRY, _NEXT_ROW, _FIRST_ROW = (np.uint32(int.from_bytes(t, "little")) for t in (b'},"', b'},{"', b'l,{"'))
_ASCII_0, _ONES, _HIGH, _TO_HIGH = _every(0x30), _every(1), _every(0x80), _every(0x76)
_PAIR, _QUAD = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF)
_BY_10, _BY_100, _BY_10000 = np.uint64(2561), np.uint64(6553601), np.uint64(42949672960001)
_S7, _S8, _S16, _S24, _S32, _S56 = (np.uint64(n) for n in (7, 8, 16, 24, 32, 56))
_FF, _MINUS, _ONE, _TEN = (np.uint64(n) for n in (0xFF, 0x2D, 1, 10))
_ZERO_CHAR, _DOT = np.uint64(0x30), np.uint64(0x2E)


@dataclass(frozen=True, slots=True)
class _Views:
    """The reply as words that begin at every byte."""

    body: bytes
    u32: NDArray[np.uint32]
    u64: _U64

    @classmethod
    def of(cls, body: bytes) -> _Views:
        size = len(body)
        return cls(
            body,
            np.ndarray((size - 3,), "<u4", body, strides=(1,)),
            np.ndarray((size - 7,), "<u8", body, strides=(1,)),
        )


class _UnusualError(Exception):
    """The reply is not exactly of the expected form."""


def _expect(holds: object) -> None:
    if not holds:
        raise _UnusualError


def read_rows(body: bytes, ids: Int32, start: int, k: int) -> tuple[Ranked, bytes] | None:
    """Read rows ``start + 1 ..`` of a scoring reply, and the reply without them (null in their place).

    None when the reply is not exactly of the expected form.
    """
    try:
        rows = _read(body, ids, start, k)
        _JSON.decode(body)  # what the reading skips must be JSON too
    except (_UnusualError, IndexError, msgspec.DecodeError):
        return None
    return rows


def _read(body: bytes, ids: Int32, start: int, k: int) -> tuple[Ranked, bytes]:
    first = body.find(_START)
    _expect(first >= 0 and k >= 1 and body[first + len(_START) :][:7] == b'null,{"')
    views = _Views.of(body)
    at = _anchors(views, first)
    end = _region_end(body, int(at[-1]))
    _expect(body.find(_START, end) < 0)
    tokens, opens = _keys(views, at)
    starts = np.flatnonzero(opens)
    _expect(starts.size == ids.size - 1 and starts[0] == 0)
    entry = int(starts[start])
    starts = starts[start:] - entry
    logp, stop = _numbers(views, at[entry:])
    ranks = _ranks(views, stop[starts])
    ranked = _assemble(tokens[entry:], logp, starts, ranks, actual=ids[start + 1 :], k=k)
    return ranked, body[: first + len(_START) - 1] + b"null" + body[end:]


def _anchors(views: _Views, first: int) -> _I64:
    """Offsets of the ``{`` of every entry."""
    buffer = np.frombuffer(views.body, dtype=np.uint8)
    last = len(views.body) - _MARGIN
    parts = [np.empty(0, dtype=np.int64)]
    for low in range(first, last, _SCAN_BYTES):
        brace = np.flatnonzero(buffer[low : min(low + _SCAN_BYTES, last)] == ord("{"))
        brace += low
        is_key = views.u64[brace - 2] == _KEY_HEAD
        is_key &= views.u64[brace + 3] == _KEY_TAIL
        parts.append(brace[is_key])
    # An entry in the last bytes of the reply would go unseen; there is none in a well-formed one.
    at = np.concatenate(parts)
    _expect(at.size and views.body.find(b'":{"logprob":', max(last - 2, 0)) < 0)
    return at


def _region_end(body: bytes, last: int) -> int:
    """Offset behind the ``]`` that closes the rows, from the last entry."""
    number = _NUMBER.match(body, last + 11)
    _expect(number)
    entry = _ENTRY_END.match(body, number.end() - 8) if number else None
    _expect(entry and body[entry.end() : entry.end() + 2] == b"}]")
    return entry.end() + 2 if entry else 0


def _keys(views: _Views, at: _I64) -> tuple[_I64, NDArray[np.bool_]]:
    """Token id of each entry, and whether it opens a row."""
    tokens = np.empty(at.size, dtype=np.int64)
    opens = np.empty(at.size, dtype=np.bool_)
    for low in range(0, at.size, _CHUNK):
        part = slice(low, low + _CHUNK)
        brace = at[part]
        digit = views.u64[brace - 10]
        digit ^= _ASCII_0
        other = digit + _TO_HIGH
        other |= digit
        other &= _HIGH
        other |= other >> _S8  # from the last non-digit down, every byte is not of the number
        other |= other >> _S16
        other |= other >> _S32
        other >>= _S7
        digit &= ~(other * _FF)
        tokens[part] = _eight(digit)
        quote = brace - 11 + ((other * _ONES) >> _S56).astype(np.int64)
        _expect((quote < brace - 3).all())
        before = views.u32[quote - 3]
        row = before == _NEXT_ROW
        if low == 0:
            row[0] = before[0] == _FIRST_ROW
        opens[part] = row
        row |= (before >> np.uint32(8)) == _NEXT_ENTRY
        _expect(row.all())
    return tokens, opens


def _numbers(views: _Views, at: _I64) -> tuple[Float64, _I64]:
    """Logprob of each entry, and the offset behind its text."""
    logp = np.empty(at.size, dtype=np.float64)
    stop = np.empty(at.size, dtype=np.int64)
    for low in range(0, at.size, _CHUNK):
        part = slice(low, low + _CHUNK)
        plain = _plain_numbers(views, at[part], logp[part], stop[part])
        for i in (np.flatnonzero(~plain) + low).tolist():  # exponents, 0.0, -9999.0, three digits before the point
            logp[i], stop[i] = read_odd_number(views.body, int(at[i]) + 11)
    return logp, stop


def read_odd_number(body: bytes, at: int) -> tuple[float, int]:
    """Read a number that is not of the plain form, and the offset behind it."""
    text = _NUMBER.match(body, at)
    if text is None:
        raise _UnusualError
    return float(text[1]), text.end() - 8


def _plain_numbers(views: _Views, brace: _I64, logp: Float64, stop: _I64) -> NDArray[np.bool_]:
    """Fills in the numbers of the form ``-d.ddd`` or ``-dd.ddd`` and says which those are."""
    head = views.u64[brace + 11]
    plain = (head & _FF) == _MINUS
    first_digit = ((head >> _S8) & _FF) - _ZERO_CHAR  # below "0" it wraps to a huge number: no digit either
    third = (head >> _S16) & _FF
    two = third - _ZERO_CHAR
    short = third == _DOT
    plain &= first_digit < _TEN
    plain &= short | ((two < _TEN) & (((head >> _S24) & _FF) == _DOT))
    whole = np.where(short, first_digit, first_digit * _TEN + two)
    place = brace + np.where(short, 14, 15)
    high, high_digits = _leading(views.u64[place])
    low_word, low_digits = _leading(views.u64[place + 8])
    full = high_digits == 8
    low_word *= full
    low_digits *= full
    np.add(place, high_digits, out=stop)
    stop += low_digits
    longer = np.flatnonzero(low_digits == 8)
    if longer.size:
        _, more = _leading(views.u64[stop[longer]])
        stop[longer] += more
    plain &= high_digits > 0
    plain &= views.u64[stop] == _RANK
    np.multiply(_eight(low_word), 1e-16, out=logp)
    logp += _eight(high) * 1e-8
    logp += whole
    np.negative(logp, out=logp)
    return np.asarray(plain)


def _leading(word: _U64) -> tuple[_U64, _I64]:
    """The leading digits of eight characters (as values, the rest 0), and how many there are."""
    word = word ^ _ASCII_0
    other = word + _TO_HIGH
    other |= word
    other &= _HIGH
    below = other & (~other + _ONE)  # the first non-digit; 0 when there is none
    below >>= _S7
    below -= _ONE
    word &= below
    below &= _ONES
    return word, ((below * _ONES) >> _S56).astype(np.int64)


def _eight(digit: _U64) -> _I64:
    """Eight digit values, most significant at the lowest address, as one integer."""
    value = digit * _BY_10
    value >>= _S8
    value &= _PAIR
    value *= _BY_100
    value >>= _S16
    value &= _QUAD
    value *= _BY_10000
    value >>= _S32
    return value.view(np.int64)


def _ranks(views: _Views, stop: _I64) -> _I64:
    """The rank that stands behind each number."""
    word, digits = _leading(views.u64[stop + 8])
    _expect(((digits > 0) & (digits < 8)).all())
    return np.asarray(_eight(word) // 10 ** (8 - digits))


def _assemble(tokens: _I64, logp: Float64, starts: _I64, ranks: _I64, *, actual: Int32, k: int) -> Ranked:
    counts = np.diff(starts, append=tokens.size)
    extra = np.asarray(counts == k + 1)
    _expect((extra | (counts == k)).all() and np.array_equal(tokens[starts], actual))
    _expect((ranks >= 1).all() and np.array_equal(extra, ranks > k))
    # The realised token stands first. Elsewhere in the list (rank r <= K) it goes to column r - 1.
    column = np.arange(k)
    place = np.where(extra, k, ranks - 1)[:, None]
    source = starts[:, None] + column
    source += column < place
    np.copyto(source, starts[:, None], where=column == place)
    actual_logp, lists = logp[starts], logp[source]
    _expect(not (extra & (actual_logp > lists[:, -1])).any())
    return Ranked(tokens.astype(np.int32)[source], lists, actual_logp, extra)
