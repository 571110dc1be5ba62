"""Mask keys in what is about to be written: those of our requests in every usual encoding, others by their name."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping

from topkd.topk.errors import ConfigError

MASK = "***"
_SHORTEST = 4  # a shorter key occurs by chance, and masking it would destroy what is around it
_HIDDEN = MASK.encode()
_WORDS = (
    "api_key", "private_key", "secret", "password", "passwd", "passphrase", "credential", "authorization", "cookie",
    "access_token", "admin_token", "auth_token", "bearer_token", "hf_token", "id_token", "refresh_token",
    "session_token", "access_key", "encryption_key", "license_key", "signing_key",
)  # fmt: skip
_NAME = "(?:" + "|".join(word.replace("_", "[_-]?") for word in _WORDS) + r")[\w-]{0,30}"
_ANCHORS = tuple(word.replace("_", joint) for word in _WORDS for joint in ("_", "-", ""))
# Every pattern takes the end of the content for a missing end of a value: where it was cut a secret may begin.
_CHARS = r"(?:(?!(?P=quote))(?:\\[\s\S]|[^\\]))"
_QUOTED = rf"(?P<quote>\\*[\"']){_CHARS}+(?:(?P=quote)|\\?\Z)"
_BEFORE = rf"{_NAME}\\*[\"']?\s*[:=]\s*"
_STRING = rf"(?P=quote){_CHARS}*(?:(?P=quote)|\\?\Z)"
_REST = r"(?!(?P=quote))[^\[\]{}]"
for _ in range(3):  # as deep as lists and objects lie in what is masked
    _REST = rf"{_STRING}|[\[{{](?:{_REST})*+(?:[\]}}]|\Z)|(?!(?P=quote))[^\[\]{{}}]"
_PLAIN = r"(?!(?:null|None|true|false)[,;)\]}]*(?:[\s\"'\\&]|\Z))(?!\[\s*(?:\\*[\"']|\]))"
_VALUE = r"(?(query)[^\s\"'\\&#]+|[^\s\"'\\]+)"
# Words of which a match has one (a look for them is quick in megabytes), the pattern, what a match becomes.
_UNKNOWN = tuple(
    (tuple(word.encode() for word in words), re.compile(pattern.encode(), re.IGNORECASE), becomes.encode())
    for words, pattern, becomes in (
        (_ANCHORS, rf"(?P<name>{_BEFORE}){_QUOTED}", r"\g<name>\g<quote>***\g<quote>"),
        (_ANCHORS, rf"(?P<name>{_BEFORE}\[)(?=[\s\[{{]*(?P<quote>\\*[\"']))(?:{_REST})*+(?:\]|\Z)",
         r"\g<name>\g<quote>***\g<quote>]"),
        (_ANCHORS, rf"(?P<name>{_BEFORE}\{{\s*(?P<quote>\\*[\"']){_CHARS}*(?P=quote)\s*:\s*)(?:{_REST})*+(?:\}}|\Z)",
         r"\g<name>\g<quote>***\g<quote>}"),
        (_ANCHORS, rf"(?P<name>(?<!-)--[\w-]{{0,30}}{_NAME}\\*[\"']\s*,\s*){_QUOTED}",
         r"\g<name>\g<quote>***\g<quote>"),
        (_ANCHORS, rf"(?P<name>(?<!-)--[\w-]{{0,30}}{_NAME} +)[^\s\"'\\]+", r"\g<name>***"),
        # The value in the query of a URL ends at the next "&"; any other goes on to a blank or a quote.
        ((*_ANCHORS, "token="), rf"(?P<name>(?P<query>[?&][\w-]{{0,30}})?(?:{_NAME}|token)=){_PLAIN}{_VALUE}",
         r"\g<name>***"),
        # Header lines; a quote before the colon makes a name one of JSON.
        (("authorization", "cookie"), r"(?P<name>(?:authorization|cookie):[ \t]*)[^\s\"'\\][^\r\n\"'\\]*",
         r"\g<name>***"),
        (_ANCHORS, rf"(?P<name>{_NAME}:[ \t]*){_PLAIN}(?!\*\*\*)[^\s\"'\\]+", r"\g<name>***"),
        # In capitals it is an environment variable; in small letters "token" names a token in every reply.
        (("_token",), rf"(?P<name>(?-i:_TOKEN)\\*[\"']?\s*[:=]\s*){_QUOTED}", r"\g<name>\g<quote>***\g<quote>"),
        (("@",), r"(?P<name>\b[a-z][a-z0-9+.-]{0,20}:(?:\\?/){2})[^/\s\"'@\\]{1,256}@", r"\g<name>***@"),
        (("bearer",), r"(?P<name>\bbearer\s+)[\w.~+/=-]{8,}", r"\g<name>***"),
        (("sk-",), r"\bsk-(?=[a-z-]{0,200}\d)[\w-]{12,}", "***"),
        (("hf_", "fw_", "tml-", "gh"), r"\b(?:hf_|fw_|tml-|gh[opsu]_)[a-z0-9]{16,}", "***"),
    )
)  # fmt: skip


class SecretMask:
    """Hides the keys it has learnt, and what is named or shaped like one.

    Attributes:
        hidden: Places masked so far.
    """

    def __init__(self) -> None:
        self.hidden = 0
        self._keys: set[str] = set()
        self._forms: list[tuple[bytes, re.Pattern[bytes]]] = []

    def learn(self, private: Mapping[str, str]) -> None:
        """Learn the keys in private headers.

        Raises:
            ConfigError: a key is too short to be told from other text.
        """
        for value in private.values():
            key = value.removeprefix("Bearer ")
            if len(key) < _SHORTEST:
                raise ConfigError(
                    "the API key is too short to be masked in a recording",
                    expected=f"at least {_SHORTEST} characters",
                    hint="record without a key, or with a longer one",
                )
            if key not in self._keys:
                self._keys.add(key)
                self._forms += [compile_form(form) for form in _list_forms(key)]

    @property
    def margin(self) -> int:
        """Bytes that no key is longer than, in any form."""
        return 1024 + 32 * max(map(len, self._keys), default=0)

    def hide(self, content: bytes) -> bytes:
        """Return the content with every secret replaced by ``***``."""
        for anchor, pattern in self._forms:
            if anchor in content:
                content, found = pattern.subn(_HIDDEN, content)
                self.hidden += found
        lower = content.lower()
        for words, pattern, becomes in _UNKNOWN:
            if any(word in lower for word in words):
                content, found = pattern.subn(becomes, content)
                self.hidden += found
        return content

    def hide_text(self, text: str) -> str:
        """Return the text with every secret replaced."""
        return self.hide(text.encode("utf-8", "surrogateescape")).decode("utf-8", "replace")


def compile_form(text: str) -> tuple[bytes, re.Pattern[bytes]]:
    """Compile a pattern for a text as JSON, HTML and URLs may write it, and a part that all of these share."""
    pattern = "".join(char if char.isalnum() else _match_escaped(char) for char in text)
    anchor = max(re.findall("[A-Za-z0-9]*", text), key=len)
    return anchor.encode(), re.compile(pattern.encode())


def _match_escaped(char: str) -> str:
    code = f"{ord(char):02x}"
    named = html.escape(char)
    ways = [re.escape(char), f"(?i:%(?:25)*{code}|u00{code}|&#x0*{code};)", f"&#0*{ord(char)};", re.escape(named)]
    return r"\\*(?:" + "|".join(ways) + ")"


def _list_forms(text: str) -> set[str]:
    """List the key, its hexadecimal form, and its base64 wherever it begins there; first and last bits may mix."""
    key = text.encode()
    forms = {text, key.hex(), key.hex().upper()}
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + key).rstrip(b"=").decode()
        mixed = (before + len(key)) % 3 != 0
        inner = encoded[(0, 2, 3)[before] : len(encoded) - mixed]
        forms |= {inner, inner.translate(str.maketrans("+/", "-_"))}
    return {form for form in forms if len(form) >= _SHORTEST}
