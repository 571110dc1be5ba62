"""Keys of records: a keyed hash of the teacher and of the exact token ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from topkd.topk.errors import ConfigError, DataError
from topkd.topk.protocols import Ids
from topkd.topk.samples import SamplingParams
from topkd.topk.types import Int32

KEY_BYTES = 16
RAW_LOGPROBS = "raw_logprobs"  # the model's own softmax: temperature 1, before any truncation or penalty


@dataclass(frozen=True, slots=True)
class TeacherIdentity:
    """Everything about a teacher that changes a logprob; never an address or a secret.

    Attributes:
        name: The server's model name (or path).
        revision: Revision, checkpoint hash, or any fingerprint that the user chooses. Empty: the name alone identifies
            the model.
        tokenizer: Hash of the tokenizer, "" when unknown.
        context: Hash of what the teacher sees beyond the ids (a template version, an adapter), "" when nothing.
        semantics: Meaning of the numbers: ``RAW_LOGPROBS`` unless the list was tempered, renormalised or quantised.
    """

    name: str
    revision: str = ""
    tokenizer: str = ""
    context: str = ""
    semantics: str = RAW_LOGPROBS

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigError("the teacher identity has no name", hint="give the server's model name")
        for field, value in asdict(self).items():
            if "://" in value:
                # The same teacher behind two addresses is one teacher, and an address may carry credentials.
                raise ConfigError(
                    f"teacher identity: {field} is a URL",
                    got=value.split("://", 1)[0] + "://...",
                    hint="use the server's model name and a revision or fingerprint",
                )
        if not self.semantics:
            raise ConfigError("the teacher identity has no logprob semantics", expected=RAW_LOGPROBS)

    @property
    def digest(self) -> bytes:
        """Hash of the identity, 32 bytes, which every key of this teacher depends on."""
        return _digest(self)

    @property
    def tag(self) -> int:
        """First 4 bytes of the digest as an integer: says which teacher a record belongs to, for listings."""
        return int.from_bytes(self.digest[:4], "little")

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, no spaces, ASCII."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> TeacherIdentity:
        """Read the JSON of ``to_json``; unknown fields are an error."""
        try:
            fields = json.loads(text)
            return cls(**fields)
        except (ValueError, TypeError) as error:
            raise DataError("not a teacher identity", got=repr(text)[:80]) from error


Teacher: TypeAlias = str | TeacherIdentity


@lru_cache(maxsize=256)
def _digest(identity: TeacherIdentity) -> bytes:
    return hashlib.blake2b(identity.to_json().encode(), digest_size=32, person=b"topkd-teacher").digest()


@lru_cache(maxsize=256)
def _score_hash(identity: TeacherIdentity) -> hashlib.blake2b:
    """Return the hash state from which every score key of a teacher starts (saves a third of a key's time)."""
    return hashlib.blake2b(digest_size=KEY_BYTES, key=identity.digest, person=b"score")


def to_identity(teacher: Teacher) -> TeacherIdentity:
    """Return a TeacherIdentity; a string becomes one with only a name."""
    return TeacherIdentity(teacher) if isinstance(teacher, str) else teacher


def check_token_array(ids: Ids) -> Int32:
    """Return int32 [N]; refuse ids that are not one-dimensional, integer and non-negative."""
    array = np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        raise DataError("token ids must be a non-empty list of integers", got=f"{array.dtype} {array.shape}")
    if array.dtype == np.int32 and array.flags.c_contiguous and np.maximum.reduce(array.view(np.uint32)) < 1 << 31:
        return array  # as unsigned, a negative id is a large one
    if array.min() < 0 or (array.dtype != np.int32 and array.max() > np.iinfo(np.int32).max):
        raise DataError("token id out of range", got=f"{array.min()}..{array.max()}", expected="0..2**31-1")
    return np.ascontiguousarray(array, dtype=np.int32)


def compute_score_key(identity: TeacherIdentity, ids: Int32) -> bytes:
    """Compute the key of a score from the teacher and its tokens; start and K are not part of it."""
    hashed = _score_hash(identity).copy()
    hashed.update(ids.astype("<i4", copy=False).data)
    return hashed.digest()


def compute_rollout_key(
    identity: TeacherIdentity, prompt_ids: Int32, params: SamplingParams, *, version: str = "", occurrence: int = 0
) -> bytes:
    """Compute the key of a rollout: policy, version, prompt, every sampling parameter, and occurrence.

    ``occurrence`` numbers repeated requests without a seed, which are meant to give different completions.
    """
    asked = json.dumps(
        {"params": asdict(params), "version": version, "occurrence": occurrence}, sort_keys=True, separators=(",", ":")
    ).encode()
    hashed = hashlib.blake2b(digest_size=KEY_BYTES, key=identity.digest, person=b"rollout")
    hashed.update(len(asked).to_bytes(4, "little") + asked)
    hashed.update(prompt_ids.astype("<i4", copy=False).tobytes())
    return hashed.digest()
