"""A second reader of the cache, written from docs/format.md alone: it imports nothing of topkd."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import xxhash
import zstandard


def records(folder):
    """Every whole record: a dict of its header, with ``payload``."""
    names = ["kind", "codec", "high", "flags", "start", "rows", "width", "asked", "size", "tag", "key", "check"]
    for path in sorted(Path(folder).glob("seg-*.tkl")):
        data = path.read_bytes()
        assert data[:8] == b"TKLSEG\r\n"
        assert struct.unpack_from("<H", data, 8)[0] == 1
        at = 64
        while at + 64 <= len(data):
            block = data[at : at + 64]
            good = block[:4] == b"TKR1" and struct.unpack("<Q", block[56:])[0] == xxhash.xxh3_64_intdigest(block[:56])
            record = dict(zip(names, struct.unpack("<BBBBIIIIII16sQ", block[4:56]), strict=True))
            payload = data[at + 64 : at + 64 + record["size"]]
            if not good or len(payload) < record["size"]:
                at += 64
                continue
            if xxhash.xxh3_64_intdigest(payload) == record["check"]:
                yield {**record, "payload": payload}
            at += 64 + -(-record["size"] // 64) * 64


def compute_score_key(identity_json, ids):
    digest = hashlib.blake2b(identity_json, digest_size=32, person=b"topkd-teacher").digest()
    return hashlib.blake2b(np.array(ids, "<i4").tobytes(), digest_size=16, key=digest, person=b"score").digest()


def score(record):
    """ids [N], realised ids, realised logprobs, tail, list ids [R, K], list logprobs [R, K]."""
    rows, width, high, codec = record["rows"], record["width"], record["high"], record["codec"]
    n, listed, data = record["start"] + 1 + rows, rows * width, record["payload"]
    if codec == 2:
        data = zstandard.ZstdDecompressor().decompress(data, max_output_size=1 << 30)
    at = 0

    def take(kind, count, planes=1):
        nonlocal at
        size = count * np.dtype(kind).itemsize
        part = np.frombuffer(data[at : at + size], "u1").reshape(planes, size // planes).T
        at += size
        return np.frombuffer(part.tobytes(), kind)

    def packed(low, count):
        above = take("u1", -(-count * high // 8))
        if high == 2:
            above = np.array([above[i // 4] >> 2 * (i % 4) & 3 for i in range(count)])
        above = above.view("<u2") if high == 16 else above if high else np.zeros(count)
        return above.astype(np.int64) * 65536 + low

    four, two = (4, 2) if codec == 2 else (1, 1)
    own = 0 if record["flags"] & 1 else rows
    if codec == 0:
        ids, actual = take("<i4", n), take("<i4", own)
        logp, tail, top, lists = take("<f4", rows), take("<f4", rows), take("<i4", listed), take("<f4", listed)
    else:
        logp, tail, actual = take("<f4", rows, four), take("<f4", rows, four), take("<i4", own)
        low, top_low, bits = take("<u2", n), take("<u2", listed, two), take("<u2", listed, two)
        if codec == 2:
            bits = np.add.accumulate(bits.reshape(rows, width), axis=1, dtype=np.uint16).reshape(-1)
        ids, top, lists = packed(low, n), packed(top_low, listed), bits.view(np.float16).astype(np.float32)
        if record["flags"] & 2:
            top = np.where(top == 2 ** (16 + high) - 1, -1, top)
    assert at == len(data)
    actual = actual if own else ids[record["start"] + 1 :]
    return ids, actual, logp, tail, top.reshape(rows, width), lists.reshape(rows, width)
