"""Questions to servers that only generate: what their draws carry, and whether their echo can be trusted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from topkd.clients.dialects.base import plain
from topkd.clients.probe import vllm as probe_vllm
from topkd.clients.probe.scores import Alignment, check_alignment
from topkd.clients.probe.session import SAMPLING, SCORING, SERVER, Session
from topkd.topk.errors import AuthError, ServerTimeoutError, ServerUnreachableError, TopkdError
from topkd.topk.types import TopK

_TEXT = "def get(self, key):\n    return self.data[key]\n"


async def check_chat_sampling(session: Session) -> None:
    """Check logprobs of chat completions, and how their tokens are named."""
    body = {
        "model": session.info.model,
        "messages": [{"role": "user", "content": _TEXT}],
        "max_completion_tokens": 1,
        "max_tokens": 1,
        "temperature": 1.0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    try:
        reply = await session.wire.post("/v1/chat/completions", body)
    except (AuthError, ServerTimeoutError, ServerUnreachableError):
        raise
    except TopkdError as error:
        session.report("unknown", "error", plain(error))
        return
    position = _first_position(reply)
    if position is None:
        session.report("warn", "no logprobs", "drawn tokens come without them")
        return
    listed = position.get("top_logprobs")
    k = len(listed) if isinstance(listed, list) else 0
    named = "by id" if isinstance(position.get("id"), int) else "by bytes" if position.get("bytes") else "by text"
    session.know(sample_k=k, ids="int" if named == "by id" else "string")
    session.report("ok" if k else "warn", f"top {k}", f"tokens are named {named}")


async def check_echo(session: Session) -> None:
    """Score draws again by echo, where a server echoes prompts with logprobs, and compare the two."""
    body = {"model": session.info.model, "prompt": _TEXT, "temperature": 0, "logprobs": 5}
    drawn = await session.wire.post("/v1/completions", body | {"max_tokens": 6})
    text = _choice(drawn).get("text")
    full = _TEXT + text if isinstance(text, str) else _TEXT
    echoed = await session.wire.post("/v1/completions", body | {"prompt": full, "max_tokens": 1, "echo": True})
    test = check_echo_alignment(_choice(drawn), _choice(echoed))
    if test is None:
        session.report("info", "no scores", "echo brings no logprobs of the prompt")
    elif test.aligned:
        session.report("info", "by text only", "echo scores text; ids cannot be asked for")
    else:
        shift = "off by one" if test.shift else f"off by {test.worst:.2g} nats"
        session.report("fail", shift, f"its echoed logprobs are {shift}: rows of another token")


def check_echo_alignment(drawn: dict[str, Any], echoed: dict[str, Any]) -> Alignment | None:
    """Compare a draw's logprobs with those of its echo; None when the echo scores nothing.

    Both are choices of ``/v1/completions`` in OpenAI's legacy form; tokens are known by their text.
    """
    drawn_legacy, other = _legacy(drawn), _legacy(echoed)
    if drawn_legacy is None or other is None:
        return None
    tokens, logp, _ = drawn_legacy
    names, values, lists = other
    count = len(tokens)
    last = next((end for end in range(len(names), count, -1) if names[end - count : end] == tokens), None)
    if last is None or count == 0:
        return None
    ids = {name: at for at, name in enumerate(dict.fromkeys([*names, *(name for row in lists for name in row)]))}
    # The row after the draw, where there is one, shows a shift in that direction.
    begin = last - count - 1
    listed = TopK.from_lists(
        [[(ids[name], value) for name, value in row.items()] for row in lists[begin:last]],
        actual_ids=np.array([ids[name] for name in names[begin:last]], dtype=np.int32),
    )
    # Set afterwards: in shifted lists, which the check is to name, these contradict the lists.
    actual_logp = np.array([np.nan if value is None else value for value in values[begin:last]], dtype=np.float32)
    scores = replace(listed, actual_logp=actual_logp)
    wanted = np.array([ids[name] for name in tokens], dtype=np.int32)
    return check_alignment(scores, wanted, np.array(logp, dtype=np.float32))


def _choice(reply: dict[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _legacy(choice: dict[str, Any]) -> tuple[list[str], list[float | None], list[dict[str, float]]] | None:
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        return None
    names, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if not isinstance(names, list) or not isinstance(values, list) or len(names) != len(values):
        return None
    lists = logprobs.get("top_logprobs")
    rows = [row or {} for row in lists] if isinstance(lists, list) and len(lists) == len(names) else [{}] * len(names)
    return names, values, rows


def _first_position(reply: dict[str, Any]) -> dict[str, Any] | None:
    logprobs = _choice(reply).get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    return first if isinstance(first, dict) else None


async def ask_openai(session: Session) -> None:
    """Ask an OpenAI-compatible server: does it score after all, does its echo hold, what do its draws carry?"""
    ask = session.ask
    if await ask("k_max", SCORING, "largest K", probe_vllm.score_limit, on_error="fail"):
        session.add("dialect", SERVER, "dialect", "warn", "vllm, it seems", "it scores: probe it with --dialect vllm")
    await ask("echo", SCORING, "echo", check_echo)
    await ask("sampling", SAMPLING, "chat draws", check_chat_sampling)
