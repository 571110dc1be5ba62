"""Reply bodies in vLLM 0.32's shapes."""

from __future__ import annotations

import base64
import io
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import msgspec
import numpy as np

from topkd.serve.engine.jobs import Completion, PromptScores
from topkd.serve.engine.refusal import not_finite
from topkd.serve.engine.texts import Fragments, Vocabulary

# JSON has no infinity: vLLM writes probability zero as this.
LOWEST = -9999.0

encode_json = msgspec.json.Encoder().encode


def finite(logp: float) -> float:
    """Return a finite number for JSON; refuse NaN."""
    if math.isnan(logp):
        raise not_finite()
    return max(logp, LOWEST)


def _finite_list(values: np.ndarray) -> list[Any]:
    if np.isnan(values).any():
        raise not_finite()
    return np.maximum(values, LOWEST).astype(np.float64).tolist()  # type: ignore[no-any-return]


_HEADS = Fragments(lambda token: b',"%d":{"logprob":' % token)
_RANKS = Fragments(lambda rank: b',"rank":%d,"decoded_token":' % rank)


def prompt_logprobs(
    scores: PromptScores, actual: Sequence[int], texts: Vocabulary | None, *, flat: bool = False
) -> msgspec.Raw:
    """Encode one entry per prompt token, the first null: the realised token, then the top K by rank.

    The bytes are joined from pieces: building a dict for every entry costs as much as the model does.

    Args:
        scores: Of the same prompt.
        actual: The prompt's ids from the second on.
        texts: Fills ``decoded_token``; None leaves it null.
        flat: vLLM's ``flat_logprobs`` shows itself on the wire only by an empty first entry.
    """
    realised_N1 = np.asarray(actual)[:, None]
    shown = np.hstack([np.ones(realised_N1.shape, dtype=bool), scores.ids != realised_N1])
    ranks = np.broadcast_to(np.arange(1, scores.ids.shape[1] + 1), scores.ids.shape)
    tokens = np.hstack([realised_N1, scores.ids])[shown].tolist()
    logps = np.hstack([scores.actual_logp[:, None], scores.logp])[shown]
    heads = list(map(_HEADS.__getitem__, tokens))
    values = encode_json(_finite_list(logps))[1:-1].split(b",")
    middles = map(_RANKS.__getitem__, np.hstack([scores.actual_rank[:, None], ranks])[shown].tolist())
    ends = shown.sum(axis=1).cumsum().tolist()
    tails = [b"null}"] * len(tokens) if texts is None else _decoded_tokens(texts, tokens, actual, ends)
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        heads[first] = b",{" + heads[first][1:]
        tails[end - 1] += b"}"
    rows = b"".join(chain.from_iterable(zip(heads, values, middles, tails, strict=True)))
    return msgspec.Raw(b"[%s%s]" % (b"{}" if flat else b"null", rows))


def _decoded_tokens(texts: Vocabulary, tokens: list[int], actual: Sequence[int], ends: list[int]) -> list[bytes]:
    """Return the text of each token as JSON with its entry's closing brace; ``ends`` are where the rows end."""
    found = list(map(texts.entry_ends.__getitem__, tokens))
    if b"" in found:  # tokens that end inside a character: their text depends on the tokens before
        begun = [not texts.entry_ends[token] for token in actual]
        for place in [place for place, text in enumerate(found) if not text]:
            row = bisect_right(ends, place)
            if row and begun[row - 1]:
                found[place] = encode_json(texts.text(tokens[place], actual[max(0, row - 4) : row])) + b"}"
            else:
                found[place] = b'""}'
    return found


def matrix(values: np.ndarray) -> str:
    """Encode a float32 matrix as a .npy file in base64."""
    if np.isnan(values).any():
        raise not_finite()
    file = io.BytesIO()
    np.save(file, values.astype("<f4", copy=False), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def entries(out: Completion, row: int) -> list[tuple[int, float, int]]:
    """List (id, logprob, rank) at a drawn position: the drawn token first, then the list without it."""
    token = out.token_ids[row]
    found = [(token, finite(out.logp[row]), out.rank[row])]
    if out.top_ids:
        logps = _finite_list(out.top_logp[row])
        listed = zip(out.top_ids[row].tolist(), logps, out.top_rank[row].tolist(), strict=True)
        found += [entry for entry in listed if entry[0] != token]
    return found


def completion_logprobs(
    out: Completion,
    texts: Vocabulary,
    *,
    k: int,
    as_ids: bool,
    drawn: range,
    echoed: Iterable[tuple[int, dict[str, Any] | None]] = (),
    offset: int = 0,
) -> dict[str, Any]:
    """Build ``choices[].logprobs`` of ``/v1/completions``.

    Args:
        out: The completion.
        texts: Names the tokens.
        k: Entries of a row besides the realised token.
        as_ids: Tokens are named by their ids.
        drawn: Which of the completion's tokens to show.
        echoed: Tokens of the prompt and their rows, shown before them.
        offset: Where in the text the first token begins.
    """

    def name(token: int, text: str) -> str:
        return f"token_id:{token}" if as_ids else text

    rows: list[list[tuple[str, float]]] = []
    tokens: list[str] = []
    for token, entry in echoed:
        rows.append(
            [(name(int(key), value["decoded_token"]), value["logprob"]) for key, value in (entry or {}).items()]
        )
        tokens.append(rows[-1][0][0] if rows[-1] else name(token, texts.alone(token)))
    for place in drawn:
        before = out.token_ids[max(0, place - 4) : place]
        rows.append([(name(token, texts.text(token, before)), logp) for token, logp, _ in entries(out, place)])
        tokens.append(rows[-1][0][0])
    offsets = list(accumulate(map(len, tokens[:-1]), initial=offset)) if tokens else []
    return {
        "text_offset": offsets,
        "token_logprobs": [listed[0][1] if listed else None for listed in rows],
        "tokens": tokens,
        # Of tokens that share a text the last one's value stands: a name is no identity, as_ids is.
        "top_logprobs": [dict(listed[: k + 1]) if listed else None for listed in rows],
    }


def chat_logprobs(
    out: Completion, texts: Vocabulary, *, k: int, as_ids: bool, drawn: range | None = None
) -> dict[str, Any]:
    """Build ``choices[].logprobs`` of chat, cut to K entries *including* the drawn token, as vLLM does.

    ``drawn`` says which tokens to show: all of them when it is None.
    """
    content = []
    for row in range(len(out.token_ids)) if drawn is None else drawn:
        token, listed = out.token_ids[row], entries(out, row)
        before = out.token_ids[max(0, row - 4) : row]
        shown = []
        for other, logp, _ in listed[:k]:
            # The bytes are those of whatever stands in `token`, as in vLLM: none for a token that ends inside a
            # character, and with ids for names those of the name. A client must not read them as the token's own.
            text = f"token_id:{other}" if as_ids else texts.text(other, before)
            shown.append({"token": text, "logprob": logp, "bytes": list(text.encode())})
        text = texts.text(token, before)
        content.append(
            {
                "token": f"token_id:{token}" if as_ids else text,
                "logprob": listed[0][1],
                "bytes": list(text.encode()),
                "top_logprobs": shown,
            }
        )
    return {"content": content}


def generate_logprobs(out: Completion, *, k: int) -> dict[str, Any]:
    """Build ``choices[].logprobs`` of ``/inference/v1/generate``: integer ids and ranks, cut to K."""
    content = []
    for row in range(len(out.token_ids)):
        listed = [{"token_id": token, "logprob": logp, "rank": rank} for token, logp, rank in entries(out, row)]
        content.append({**listed[0], "top_logprobs": listed[:k]})
    return {"content": content}


def weight_versions(out: Completion) -> list[dict[str, Any]]:
    """List which weights drew which tokens, as spans."""
    spans: list[dict[str, Any]] = []
    for position, version in enumerate(out.versions):
        if spans and spans[-1]["version"] == version:
            spans[-1]["end"] = position + 1
        else:
            spans.append({"version": version, "start": position, "end": position + 1})
    return spans


def usage(prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, Any]:
    """Count tokens."""
    drawn = sum(len(out.token_ids) for out in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + drawn,
        "completion_tokens": drawn,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
