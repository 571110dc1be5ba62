"""The compiled way of unpacking lists gives the bits that NumPy's gives, and waits until it pays."""

import sys

import numpy as np
import pytest

from tests.offline.samples import same, scored
from topkd.offline.store import codecs
from topkd.offline.store.codecs import Unpacker, _from_half, _join, load_unpacker


def every_pattern(seed=0):
    """All plain float16 patterns with random ids, and a misaligned start as in a record."""
    rng = np.random.default_rng(seed)
    bits = np.concatenate([np.arange(0x8000, 0xFC00), np.full(1024, 0x8000)]).astype("<u2")
    buffer = np.zeros(2 + 2 * bits.size, np.uint8)
    shifted = buffer[2:].view("<u2")
    shifted[:] = rng.permutation(bits)
    return rng.integers(0, 1 << 16, bits.size).astype("<u2"), rng.integers(0, 256, bits.size // 4, np.uint8), shifted


def test_numpy_widens_every_plain_pattern_exactly():
    _, _, bits = every_pattern()
    assert np.array_equal(_from_half(bits, plain=True).view("u4"), bits.view("<f2").astype("<f4").view("u4"))


def test_compiled_lists_equal_numpys_bit_for_bit():
    pytest.importorskip("numba")
    low, high, bits = every_pattern()
    ids, logp = Unpacker(0).lists(low, high, bits)
    assert np.array_equal(ids, _join(low, high, 2))
    assert ids.max() >= 3 << 16, "all high bits are in use"
    assert np.array_equal(logp.view("u4"), _from_half(bits, plain=True).view("u4"))


def test_the_compiler_is_loaded_only_after_much_work_and_never_for_small_lists(monkeypatch):
    asked = []
    monkeypatch.setattr(codecs, "load_unpacker", lambda: asked.append(1))
    low, high, bits = every_pattern()
    unpacker = Unpacker(3 * low.size)
    for _ in range(3):
        assert unpacker.lists(low, high, bits) is None
    assert asked == []
    assert unpacker.lists(low[:64], high[:16], bits[:64]) is None
    assert asked == []
    assert unpacker.lists(low, high, bits) is None  # there is no compiler: NumPy goes on
    assert asked == [1]


def test_without_numba_there_is_no_kernel(monkeypatch):
    load_unpacker.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    try:
        assert load_unpacker() is None
    finally:
        load_unpacker.cache_clear()


def test_a_record_reads_the_same_before_and_after_the_compiler_takes_over(monkeypatch):
    pytest.importorskip("numba")
    ids, rows = scored(5, tokens=300, k=20)
    shape, payload = codecs.encode(ids, rows, "packed")
    decoded = []
    for worth_it in (1 << 60, 0):
        monkeypatch.setattr(codecs, "unpacker", Unpacker(worth_it))
        decoded.append(codecs.decode(shape, memoryview(payload))[1])
    assert same(*decoded)
    assert not decoded[1].logp.flags.writeable
