"""Sampling replies of ``/inference/v1/generate``, in the three shapes of its releases, to one. Pure.

Before 0.32 an entry names its token ``"token_id:N"``; from 0.32 on it has an integer ``token_id`` and a rank. Until
0.32 a list is cut to the K asked for *including* the sampled token, which comes first; from 0.33 on it is whole.
Each list is cut to its k best and the sampled token, which is the form of ``/v1/completions``.
"""

from __future__ import annotations

import msgspec

from topkd.clients.decoding.sampled import Logprobs, Sampled, SampledChoice, SampleRequest, Span, read_rollouts
from topkd.clients.decoding.vllm_typed import typed
from topkd.topk.errors import ResponseError
from topkd.topk.samples import Rollout

_PREFIX = "token_id:"


class _Entry(msgspec.Struct):
    logprob: float | None
    token_id: int | None = None
    token: str | None = None
    rank: int | None = None

    def id(self) -> int:
        """The token id, however it is written."""
        if self.token_id is not None:
            return self.token_id
        if self.token is not None and self.token.startswith(_PREFIX) and self.token[len(_PREFIX) :].isdecimal():
            return int(self.token[len(_PREFIX) :])
        raise ResponseError("a sampled entry has no token id", got=self.token, expected="token_id, or 'token_id:N'")


class _Position(_Entry):
    top_logprobs: list[_Entry] = []


class _Logprobs(msgspec.Struct):
    content: list[_Position] | None = None


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    weight_versions: list[Span] | None = None


class _Generated(msgspec.Struct):
    choices: list[_Choice]


_DECODER = msgspec.json.Decoder(_Generated)


def read_generate_rollouts(body: bytes, *, asked: SampleRequest) -> list[Rollout]:
    """The n rollouts of a reply; errors as ``sampled.read_rollouts``."""
    choices = [_choice(choice, asked.k) for choice in typed(body, _DECODER).choices]
    return read_rollouts(msgspec.json.encode(Sampled(choices)), asked=asked)


def _choice(choice: _Choice, k: int) -> SampledChoice:
    content = choice.logprobs.content if choice.logprobs else None
    logprobs = None
    if content is not None:
        logprobs = Logprobs(
            token_logprobs=[entry.logprob for entry in content],
            tokens=[f"{_PREFIX}{entry.id()}" for entry in content],
            top_logprobs=[_list(entry, k, place, choice.index) for place, entry in enumerate(content)],
        )
    return SampledChoice(
        index=choice.index,
        token_ids=choice.token_ids,
        logprobs=logprobs,
        finish_reason=choice.finish_reason,
        weight_versions=choice.weight_versions,
    )


def _list(position: _Position, k: int, place: int, index: int) -> dict[str, float | None]:
    if k == 0:
        return {}
    best: dict[int, _Entry] = {}
    for entry in position.top_logprobs:
        if entry.logprob is None:
            raise ResponseError("a listed logprob is null", where=f"choice {index}, token {place}")
        best.setdefault(entry.id(), entry)
    top = sorted(best.items(), key=lambda item: -(item[1].logprob or 0.0))[:k]
    ranks = sorted(entry.rank for _, entry in top if entry.rank is not None)
    # Equal logprobs share a rank in some kernels, so a rank above its place is what shows a gap.
    if any(rank > at for at, rank in enumerate(ranks, start=1)):
        raise ResponseError(
            "a top-K entry is missing", where=f"choice {index}, token {place}", got=f"ranks {ranks[-3:]}", expected=k
        )
    listed = {f"{_PREFIX}{token}": entry.logprob for token, entry in top}
    return listed | {f"{_PREFIX}{position.id()}": position.logprob}
