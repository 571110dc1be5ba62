"""Questions about token ids: which the model has, which of them are padding, and whether they mean the student's."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from topkd.clients.decoding.byte_map import ByteMap
from topkd.clients.decoding.vllm import as_ids
from topkd.clients.dialects.base import Wire
from topkd.clients.dialects.vllm import build_vllm_score
from topkd.clients.probe.session import TEXT, TOKENS, Session
from topkd.clients.probe.vllm import ROUTE
from topkd.topk.errors import FinalServerError, ResponseError, ServerFailedError
from topkd.topk.types import Int32

# Ids that exist in every vocabulary, and are no special tokens of any common one.
_PLAIN = np.array([71, 105, 40, 83, 99, 97, 66, 110, 52, 101, 75, 88, 117, 61, 93, 45], dtype=np.int32)
_LONGEST = 48
_LISTED = 64
_SPELT = 24


async def probe_prompt(wire: Wire, model: str, student: ByteMap | None) -> Int32:
    """Choose ids to score: the server's own reading of a text, else the student's, else small numbers."""
    ids = await tokenize_remotely(wire, model, TEXT)
    if ids is None and student is not None:
        ids = np.array(student.encode(TEXT), dtype=np.int32)
    return _PLAIN if ids is None or ids.size < 8 else ids[:_LONGEST]


async def tokenize_remotely(wire: Wire, model: str, text: str) -> Int32 | None:
    """Ask ``/tokenize`` for a text's ids, without special tokens; None where there is no such route."""
    body = {"model": model, "prompt": text, "content": text, "add_special_tokens": False, "add_special": False}
    try:
        tokens = (await wire.post("/tokenize", body)).get("tokens")
        if isinstance(tokens, list) and tokens and all(isinstance(token, int) for token in tokens):
            return as_ids(tokens, "/tokenize")
    except (FinalServerError, ResponseError, ServerFailedError):
        pass
    return None


async def check_vocabulary_size(session: Session) -> None:
    """Check the vocabulary's size: the server takes the last id, refuses the next, and no reply held a larger one."""
    size = session.capabilities.vocab_size
    if not size:
        session.report("unknown", "size not stated", "no limit on K names it")
        return
    last, beyond = [await _taken(session, token) for token in (size - 1, size)]
    stray = sorted(token for token in session.seen_ids if token >= size)
    if stray:
        session.report("fail", f"id {stray[0]}", f"its replies hold ids past {size - 1}")
        return
    session.report(
        "ok" if last and not beyond else "warn",
        f"0..{size - 1:,}",
        f"{len(session.seen_ids)} ids seen inside; {size} {'taken' if beyond else 'refused'}"
        + ("" if last else f", {size - 1} too"),
    )


async def _taken(session: Session, token: int) -> bool:
    ids = np.array([int(session.prompt[0]), token], dtype=np.int64)
    try:
        await session.wire.post(ROUTE, build_vllm_score(session.info.model, ids, 1))  # type: ignore[arg-type]
    except (FinalServerError, ServerFailedError):
        return False
    return True


async def check_spelling(session: Session) -> None:
    """Read how the server spells the ids of one wide score: evidence for the tokenizer it uses."""
    limit = session.capabilities.score_k or 1
    k = _LISTED if limit < 0 else min(_LISTED, limit)
    body = build_vllm_score(session.info.model, session.prompt, k)
    reply = await session.wire.post(ROUTE, body, entries=int(session.prompt.size) * (k + 1), k=k)
    rows: Any = reply["choices"][0].get("prompt_logprobs") if reply.get("choices") else None
    for row in rows if isinstance(rows, list) else []:
        for token, entry in (row or {}).items():
            spelt = entry.get("decoded_token") if isinstance(entry, dict) else None
            if isinstance(spelt, str) and spelt and "�" not in spelt:  # half a character is spelt by its neighbours
                session.decoded[int(token)] = spelt
            session.seen_ids.add(int(token))


async def check_tokenizer(session: Session) -> None:
    """Compare the server's ids with the student's, by what they spell and by how a text is cut."""
    student = session.student
    if student is None:
        session.report("unknown", "not asked", "--student FOLDER compares them")
        return
    padding = (session.capabilities.vocab_size or student.size) - student.size
    session.add(
        "padding",
        TOKENS,
        "padding ids",
        "info" if padding >= 0 else "warn",
        str(padding) if padding > 0 else "none",
        f"the tokenizer knows {student.size:,} ids",
    )
    if not session.decoded:
        await _detokenize(session)
    differ = [token for token, spelt in sorted(session.decoded.items()) if not _spells(student, token, spelt)]
    if differ:
        token = differ[0]
        mine = student.token_bytes.get(token, b"").decode("utf-8", "replace")
        server_text = session.decoded[token]
        why = f"its tokens are not the student's: id {token} is {server_text!r} there and {mine!r} here"
        value = f"no: {len(differ)} of {len(session.decoded)}"
        session.report("fail", value, why)
        return
    ids = await tokenize_remotely(session.wire, session.info.model, TEXT)
    cut = None if ids is None else await asyncio.to_thread(_cut_alike, student, ids.tolist())
    seen = f"{len(session.decoded)} ids are spelt alike"
    if not session.decoded and not cut:
        why = "the server spells no id" + ("; a test text gives other ids" if cut is False else " and has no /tokenize")
        session.report("unknown" if cut is None else "warn", "not shown", why)
    elif cut is False:
        # Harmless while ids travel and text does not; the teacher then reads cuts it was not trained on.
        session.report("warn", "yes, cut otherwise", f"{seen}; a test text gives other ids")
    else:
        session.report("ok", "yes", seen + (", a test text gives the same ids" if cut else ""))


async def _detokenize(session: Session) -> None:
    """Ask ``/detokenize`` for a few ids, for servers whose scores hold no text."""
    if not await session.wire.mounted("/detokenize"):
        return
    for token in sorted({*session.prompt.tolist(), *sorted(session.seen_ids)[::16]})[:_SPELT]:
        try:
            reply = await session.wire.post("/detokenize", {"model": session.info.model, "tokens": [token]})
        except (FinalServerError, ResponseError, ServerFailedError):
            return
        spelt = reply.get("prompt", reply.get("text"))
        if isinstance(spelt, str) and spelt and "�" not in spelt:
            session.decoded[token] = spelt


def _cut_alike(student: ByteMap, ids: list[int]) -> bool:
    """Compare the student's ids of the test text, by its tokenizer's file or as transformers loads it."""
    return ids == student.encode(TEXT) or ids == student.encode_as_loaded(TEXT)


def _spells(student: ByteMap, token: int, spelt: str) -> bool:
    known = student.token_bytes.get(token)
    if known is None:
        return False
    # The server decoded the id on its own: sentencepiece drops a leading space then.
    if known == spelt.encode() or student.tokenizer.decode([token], skip_special_tokens=False) == spelt:
        return True
    # Half a character: vLLM completes it with the bytes of the tokens before, or shows the raw piece.
    whole = known.decode("utf-8", "ignore").encode() == known
    return not whole and (known in spelt.encode() or student.tokenizer.id_to_token(token) == spelt)
