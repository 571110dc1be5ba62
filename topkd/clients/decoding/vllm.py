"""Picks the fastest reading of a reply that this machine has; the typed one explains whatever is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from topkd.clients.decoding import vllm_numba as decode_numba
from topkd.clients.decoding import vllm_numpy as decode_numpy
from topkd.clients.decoding.checks import Ranked, build_ranked_scores, build_scores
from topkd.clients.decoding.vllm_typed import read_prompt_rows, scored_choice
from topkd.topk.errors import AlignmentError
from topkd.topk.types import Int32, TopK

Reader = Callable[[bytes, Int32, int, int], tuple[Ranked, bytes] | None]
_WORTH_IT = 16_384  # bytes below which the typed decoder is as fast


@cache
def fast_reader() -> Reader:
    """numba's where it is installed, else NumPy's."""
    return decode_numba.read_rows_compiled if decode_numba.available() else decode_numpy.read_rows


def read_vllm_scores(
    body: bytes, *, ids: Int32, start: int, k: int, vocab_size: int | None = None
) -> tuple[TopK, int, bool]:
    """Bytes of a ``/v1/completions`` reply to checked rows.

    Returns:
        The rows, how many zero-probability sentinels they held, and whether the fast reading was taken.
    """
    fast = fast_reader()(body, ids, start, k) if len(body) >= _WORTH_IT else None
    if fast is None:
        choice = scored_choice(body)
        check_prompt(choice.prompt_token_ids, ids)
        return *build_scores(read_prompt_rows(choice, ids, start), ids, start, k, vocab_size), False
    rows, envelope = fast
    check_prompt(scored_choice(envelope).prompt_token_ids, ids)
    return *build_ranked_scores(rows, ids, start, vocab_size), True


def check_prompt(echoed: list[int] | None, ids: Int32) -> None:
    """The server's own account of what it scored, when it gives one."""
    if echoed is not None and echoed != ids.tolist():
        at = next(
            (i for i, (a, b) in enumerate(zip(echoed, ids.tolist(), strict=False)) if a != b),
            min(len(echoed), ids.size),
        )
        raise AlignmentError(
            "the server scored another prompt",
            where=f"position {at}",
            got=f"{len(echoed)} tokens, {echoed[at : at + 3]} there",
            expected=f"{ids.size} tokens, {ids[at : at + 3].tolist()} there",
        )
