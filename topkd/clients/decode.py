"""Picks the fastest reading of a reply that this machine has; the typed one explains whatever is wrong."""

from __future__ import annotations

from topkd.clients.checks import Entries
from topkd.clients.decode_json import prompt_rows, scored_choice
from topkd.topk.errors import AlignmentError
from topkd.topk.types import Int32


def decode_scored(body: bytes, ids: Int32, start: int, k: int) -> Entries:
    """Entries of rows ``start + 1 ..`` of a scoring reply of ``/v1/completions``."""
    del k
    choice = scored_choice(body)
    check_prompt(choice.prompt_token_ids, ids)
    return prompt_rows(choice, ids, start)


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
