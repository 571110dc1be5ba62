"""Records: a 64-byte checksummed header and a payload (docs/format.md)."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import xxhash

from topkd.offline.store.codecs import CODECS, CodecName, Shape, decode, encode
from topkd.offline.store.keys import KEY_BYTES, TeacherIdentity
from topkd.topk.errors import CacheCorruptError, CacheError
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Int32, TopK

ALIGN = 64
MAGIC = b"TKR1"
SCORE, ROLLOUT, IDENTITY = 1, 2, 3
KIND_NAMES = {SCORE: "score", ROLLOUT: "rollout", IDENTITY: "identity"}

_HEADER = struct.Struct("<4sBBBBIIIIII16sQ")
_CHECK = struct.Struct("<Q")
_ROLLOUT_HEAD = struct.Struct("<I")
_MAX_PAYLOAD = (1 << 32) - 1


class Header(NamedTuple):
    """The header before a payload.

    Attributes:
        kind: SCORE, ROLLOUT or IDENTITY.
        codec: Encoding of the payload's lists: 0 raw, 1 packed, 2 cold.
        high_bits: Bits of a packed id above the low 16.
        flags: See ``codecs``.
        start: First source position of a score; number of rollouts of a rollout record.
        rows: Scored positions; completion tokens in all for a rollout record.
        width: Columns that are stored.
        asked: The K that was requested: the record answers every request with K up to it.
        size: Payload bytes, without the padding to 64.
        tag: First 4 bytes of the identity's digest.
        key: 16 bytes.
        check: xxh3-64 of the payload.
    """

    kind: int
    codec: int
    high_bits: int
    flags: int
    start: int
    rows: int
    width: int
    asked: int
    size: int
    tag: int
    key: bytes
    check: int

    def to_bytes(self) -> bytes:
        """Return the 64 bytes, checksum last."""
        packed = _HEADER.pack(
            MAGIC, self.kind, self.codec, self.high_bits, self.flags, self.start, self.rows, self.width, self.asked,
            self.size, self.tag, self.key, self.check,
        )  # fmt: skip
        return packed + _CHECK.pack(xxhash.xxh3_64_intdigest(packed))

    @property
    def span(self) -> int:
        """Number of bytes from this header to the next."""
        return ALIGN + -(-self.size // ALIGN) * ALIGN


def read_header(block: bytes | memoryview) -> Header | None:
    """Read a header from 64 bytes; None when magic or checksum is wrong."""
    if len(block) < ALIGN or bytes(block[:4]) != MAGIC:
        return None
    if _CHECK.unpack_from(block, 56)[0] != xxhash.xxh3_64_intdigest(block[:56]):
        return None
    return unpack_header(block, 0)


def unpack_header(buffer: bytes | memoryview, offset: int) -> Header:
    """Unpack the header at an offset without checking its checksum."""
    return Header._make(_HEADER.unpack_from(buffer, offset)[1:])


class Record(NamedTuple):
    """A record whose checksums are right."""

    header: Header
    payload: memoryview

    def score(self) -> tuple[Int32, TopK]:
        """Decode the sequence and its scores."""
        return decode(_shape(self.header), self.payload)

    def rollouts(self) -> list[Rollout]:
        """Decode the rollouts of one request."""
        return _decode_rollouts(self.header, self.payload)

    def identity(self) -> TeacherIdentity:
        """Decode the teacher that records with this header's tag belong to."""
        return TeacherIdentity.from_json(bytes(self.payload))


def verify_record(header: Header, payload: memoryview, where: str) -> Record:
    """Return the record; raise CacheCorruptError when its payload's checksum is wrong."""
    if len(payload) != header.size or xxhash.xxh3_64_intdigest(payload) != header.check:
        raise CacheCorruptError(
            f"the checksum of a {KIND_NAMES.get(header.kind, 'unknown')} record is wrong",
            where=where,
            hint="the record is skipped; `topkd cache verify` lists what is damaged",
        )
    return Record(header, payload)


def build_score_record(
    identity: TeacherIdentity, key: bytes, ids: Int32, scores: TopK, *, codec: CodecName, asked: int
) -> tuple[Header, bytes]:
    """Build header and payload of one score."""
    shape, payload = encode(ids, scores, codec)
    return _add_header(SCORE, shape, payload, asked=max(asked, scores.k), tag=identity.tag, key=key)


def build_rollout_record(
    identity: TeacherIdentity, key: bytes, rollouts: Sequence[Rollout], *, codec: CodecName, asked: int
) -> tuple[Header, bytes]:
    """Build header and payload of one request's rollouts; sampled logprobs are exact, lists use ``codec``."""
    described: list[dict[str, Any]] = []
    body: list[bytes] = []
    for rollout in rollouts:
        entry: dict[str, Any] = {
            "finish_reason": rollout.finish_reason,
            "version": rollout.version,
            "sampling": asdict(rollout.sampling),
            "prompt": int(rollout.prompt_ids.size),
            "completion": int(rollout.completion_ids.size),
        }
        body += [
            rollout.prompt_ids.astype("<i4").tobytes(),
            rollout.completion_ids.astype("<i4").tobytes(),
            rollout.logp.astype("<f4").tobytes(),
        ]
        if rollout.topk is not None:
            sequence = np.concatenate([rollout.prompt_ids, rollout.completion_ids])
            shape, lists = encode(sequence, rollout.topk, codec)
            entry["lists"] = {**shape._asdict(), "size": len(lists)}
            body.append(lists + bytes(-len(lists) % 4))  # so that the next rollout's arrays are aligned
        described.append(entry)
    head = json.dumps({"rollouts": described}, sort_keys=True, separators=(",", ":")).encode()
    head += b" " * (-(_ROLLOUT_HEAD.size + len(head)) % 4)
    width = max((rollout.topk.k for rollout in rollouts if rollout.topk is not None), default=0)
    tokens = sum(rollout.completion_ids.size for rollout in rollouts)
    shape = Shape(CODECS[codec], 0, 0, len(rollouts), tokens, width)
    payload = b"".join([_ROLLOUT_HEAD.pack(len(head)), head, *body])
    return _add_header(ROLLOUT, shape, payload, asked=max(asked, width), tag=identity.tag, key=key)


def build_identity_record(identity: TeacherIdentity) -> tuple[Header, bytes]:
    """Build header and payload that name a teacher."""
    payload = identity.to_json().encode()
    return _add_header(
        IDENTITY, Shape(0, 0, 0, 0, 0, 0), payload, asked=0, tag=identity.tag, key=identity.digest[:KEY_BYTES]
    )


def _add_header(kind: int, shape: Shape, payload: bytes, *, asked: int, tag: int, key: bytes) -> tuple[Header, bytes]:
    if len(payload) > _MAX_PAYLOAD:
        raise CacheError("a record would be over 4 GiB", got=f"{shape.rows} rows x {shape.width}", hint="lower K")
    return Header(
        kind, shape.codec, shape.high_bits, shape.flags, shape.start, shape.rows, shape.width, asked, len(payload),
        tag, key, xxhash.xxh3_64_intdigest(payload),
    ), payload  # fmt: skip


def _shape(header: Header) -> Shape:
    return Shape(header.codec, header.high_bits, header.flags, header.start, header.rows, header.width)


def _decode_rollouts(header: Header, payload: memoryview) -> list[Rollout]:
    (size,) = _ROLLOUT_HEAD.unpack_from(payload)
    position = _ROLLOUT_HEAD.size + size
    described = json.loads(bytes(payload[_ROLLOUT_HEAD.size : position]))["rollouts"]
    if len(described) != header.start:
        raise CacheCorruptError("a rollout record and its header differ", got=len(described), expected=header.start)

    def take(dtype: str, count: int) -> Any:
        nonlocal position
        array = np.frombuffer(payload, dtype, count, position)
        position += array.nbytes
        array.flags.writeable = False
        return array

    rollouts = []
    for entry in described:
        prompt, completion = take("<i4", entry["prompt"]), take("<i4", entry["completion"])
        logp, topk = take("<f4", entry["completion"]), None
        if "lists" in entry:
            lists = dict(entry["lists"])
            length = lists.pop("size")
            _, topk = decode(Shape(**lists), payload[position : position + length])
            position += length + -length % 4
        sampling = {**entry["sampling"], "stop_token_ids": tuple(entry["sampling"]["stop_token_ids"])}
        rollouts.append(
            Rollout(
                prompt, completion, logp, entry["finish_reason"], SamplingParams(**sampling), topk, entry["version"]
            )
        )
    return rollouts
