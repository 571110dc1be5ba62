"""Map token ids to bytes by a tokenizer's own tables, to recover ids from servers that send text.

Two ids can stand for the same bytes (a byte token and a letter, a special token and its spelling): such bytes name no
id, and whoever looks them up is told so.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from topkd.topk.errors import ConfigError

_SPACE = "▁"  # how sentencepiece writes a space


@dataclass(frozen=True)
class ByteMap:
    """The bytes of every token id of one tokenizer.

    Attributes:
        token_bytes: id -> bytes; special tokens stand for their spelling.
        special: Ids of special tokens.
        tokenizer: The ``tokenizers.Tokenizer`` itself.
        source: Folder it was read from, where there is one.
        loaded: Ids of a text (no special tokens around it) as whoever loads the model cuts it, where that is known.
    """

    token_bytes: dict[int, bytes]
    special: frozenset[int]
    tokenizer: Any
    source: Path | None = None
    loaded: Callable[[str], list[int]] | None = None

    @property
    def size(self) -> int:
        """Return one more than the largest id."""
        return max(self.token_bytes, default=-1) + 1

    @cached_property
    def ids_of(self) -> dict[bytes, tuple[int, ...]]:
        """Map bytes to the ids that stand for them."""
        found: defaultdict[bytes, list[int]] = defaultdict(list)
        for token, spelt in self.token_bytes.items():
            found[spelt].append(token)
        return {spelt: tuple(sorted(ids)) for spelt, ids in found.items()}

    @cached_property
    def fingerprint(self) -> str:
        """Hash what every id stands for."""
        table = b"".join(b"%d:%d:%s" % (token, len(spelt), spelt) for token, spelt in sorted(self.token_bytes.items()))
        return xxhash.xxh3_128_hexdigest(table)

    def only_id(self, spelt: bytes) -> int | None:
        """Find the only id that stands for these bytes; None when there is none, or more than one."""
        ids = self.ids_of.get(spelt, ())
        return ids[0] if len(ids) == 1 else None

    def encode(self, text: str) -> list[int]:
        """Encode a text without special tokens around it, as tokenizer.json cuts it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_as_loaded(self, text: str) -> list[int] | None:
        """Encode a text as ``loaded`` cuts it; None where that is not known.

        For some model types transformers builds the pre-tokenizer itself, whatever tokenizer.json says. Servers and
        trainers load tokenizers through it, so that is what a text becomes there.
        """
        return None if self.loaded is None else self.loaded(text)


def load_bytemap(source: str | Path) -> ByteMap:
    """Load the byte map of a ``tokenizer.json``, a folder that holds one, or a Hugging Face id in the local cache.

    Raises:
        ConfigError: there is no such tokenizer here, or it is of a kind whose bytes are not known.
    """
    from tokenizers import Tokenizer

    path = _find(str(source))
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ConfigError("the tokenizer cannot be read", where=str(path), got=str(error)) from error
    folder = path.parent if (path.parent / "config.json").exists() else None
    return replace(read_byte_map(tokenizer, where=str(path)), source=folder)


def read_byte_map(tokenizer: Any, *, where: str = "tokenizer") -> ByteMap:
    """Read the byte map of a ``tokenizers.Tokenizer``."""
    definition = json.loads(tokenizer.to_str())
    added = {entry["id"]: entry for entry in definition.get("added_tokens") or []}
    kinds = _kinds(definition.get("decoder")) | _kinds(definition.get("pre_tokenizer"))
    if "ByteLevel" in kinds:
        spell = _byte_level
    elif kinds & {"Metaspace", "ByteFallback"} or definition.get("model", {}).get("byte_fallback"):
        spell = _sentencepiece
    else:
        raise ConfigError(
            "the tokenizer is neither byte-level nor of the sentencepiece kind: the bytes of its tokens are not known",
            where=where,
            got=", ".join(sorted(kinds)) or "no decoder",
        )
    table: dict[int, bytes] = {}
    for piece, token in tokenizer.get_vocab(with_added_tokens=True).items():
        table[token] = piece.encode() if token in added else spell(piece)
    special = frozenset(token for token, entry in added.items() if entry.get("special"))
    return ByteMap(table, special, tokenizer)


def _find(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        path /= "tokenizer.json"
    if path.is_file():
        return path
    if path.name != "tokenizer.json" and source.count("/") <= 1 and not source.startswith((".", "/", "~")):
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(source, "tokenizer.json")
        except ValueError:  # not the form of a repository id
            cached = None
        if isinstance(cached, str):
            return Path(cached)
    raise ConfigError(
        "no tokenizer found",
        got=repr(source),
        expected="a tokenizer.json, a folder with one, or a Hugging Face id in the local cache",
    )


def _kinds(part: Any) -> set[str]:
    if not isinstance(part, dict):
        return set()
    kinds = {str(part.get("type"))}
    for name in ("decoders", "pretokenizers"):
        for inner in part.get(name) or []:
            kinds |= _kinds(inner)
    return kinds


def _alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


_ALPHABET = _alphabet()


def _byte_level(piece: str) -> bytes:
    # A piece with a character outside the alphabet was added as text.
    return bytes(_ALPHABET[c] for c in piece) if all(c in _ALPHABET for c in piece) else piece.encode()


def _sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            return piece.encode()
    return piece.replace(_SPACE, " ").encode()
