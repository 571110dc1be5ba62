"""One record a dialect: the only list of dialects, read by clients, probe, configs, forecast and command line.

Importing it loads no client: each record names its client class and its probe questions, and imports them when asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from topkd.topk.errors import ConfigError

if TYPE_CHECKING:
    from topkd.clients.dialects.base import HttpClient

AUTO = "auto"  # in place of a name: ask the server


@dataclass(frozen=True, slots=True)
class ReplyShape:
    """Size in bytes of the reply to a scoring request.

    Attributes:
        row: Bytes per position, without the list.
        entry: Bytes per entry of the list.
        prompt: Whether the reply also has the positions of the prompt, requested or not.
    """

    row: float
    entry: float
    prompt: bool

    def size(self, prompt: int, completion: int, k: int) -> float:
        """Return the bytes of the reply to one request."""
        positions = completion + max(prompt - 1, 0) * self.prompt
        return positions * (self.row + k * self.entry)


@dataclass(frozen=True, slots=True)
class Dialect:
    """Facts about a dialect that the rest of the package needs.

    Attributes:
        name: As users write it.
        client: ``module:class`` of its client.
        questions: ``module:function`` that asks a server what a probe wants to know; the default asks what any dialect
            answers through its client.
        scores: It scores given ids: it can teach.
        candidates: It scores ids of the caller's choice too.
        samples: It continues given ids, with the logprobs they were drawn with.
        chats: It samples from messages, in text.
        sink: ``module:class`` of the weight sink that brings new weights to it; "" where none can be brought.
        spells: Its scores hold the text of each id.
        samples_best_as: The dialect in which the same server samples best.
        max_k: The largest K that any of its servers takes; 0: each server has its own limit, or none.
        reply: Size of the reply to a scoring request, measured on the embedded server and a real vLLM.
    """

    name: str
    client: str
    questions: str = "topkd.clients.probe.scores:ask_scorer"
    scores: bool = False
    candidates: bool = False
    samples: bool = False
    chats: bool = False
    sink: str = ""
    spells: bool = False
    samples_best_as: str = ""
    max_k: int = 0
    reply: ReplyShape = ReplyShape(70, 70, prompt=True)

    @property
    def syncs(self) -> bool:
        """Check that new weights of a student can be brought to it."""
        return bool(self.sink)

    def load_client(self) -> type[HttpClient]:
        """Import the client class."""
        return _load(self.client)  # type: ignore[no-any-return]

    def load_questions(self) -> Callable[..., Any]:
        """Import the probe's questions."""
        return _load(self.questions)  # type: ignore[no-any-return]

    def load_sink(self) -> type[Any]:
        """Import the class of the weight sink, an ``HttpSink``; the record must have one."""
        return _load(self.sink)  # type: ignore[no-any-return]


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


_CLIENTS, _PROBE, _SINKS = "topkd.clients.dialects", "topkd.clients.probe", "topkd.clients.weights.sinks"

# In the order in which "auto" tries them: each client says whether a server is of its kind, the last takes any.
DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "fireworks",
            f"{_CLIENTS}.fireworks:FireworksEcho",
            scores=True,
            max_k=5,
            reply=ReplyShape(70, 70, prompt=False),
        ),
        Dialect(
            "vllm_generate",
            f"{_CLIENTS}.vllm_generate:VllmGenerate",
            f"{_PROBE}.vllm:ask_vllm",
            scores=True,
            candidates=True,
            samples=True,
            sink=f"{_SINKS}:VllmWeightSink",
            spells=True,
            samples_best_as="vllm",  # completions list the sampled token in addition to the K, not as one of them
        ),
        Dialect(
            "vllm",
            f"{_CLIENTS}.vllm:VllmCompletions",
            f"{_PROBE}.vllm:ask_vllm",
            scores=True,
            samples=True,
            sink=f"{_SINKS}:VllmWeightSink",
            spells=True,
        ),
        Dialect(
            "sglang",
            f"{_CLIENTS}.sglang:Sglang",
            f"{_PROBE}.sglang:ask_sglang",
            scores=True,
            candidates=True,
            samples=True,
            sink=f"{_SINKS}:SglangWeightSink",
            reply=ReplyShape(38, 32 / 3, prompt=False),  # eight bytes in base64
        ),
        Dialect(
            "openai",
            f"{_CLIENTS}.openai:OpenAIChat",
            f"{_PROBE}.openai:ask_openai",
            chats=True,
            max_k=20,
            samples_best_as="openai",  # opened again with the tokenizer's table
        ),
    )
}


def list_dialects(**wanted: bool) -> tuple[str, ...]:
    """List "auto" and the dialects with the given abilities: ``list_dialects(scores=True)``; any of several will do."""
    names = [d.name for d in DIALECTS.values() if not wanted or any(getattr(d, ability) for ability in wanted)]
    return (AUTO, *sorted(names))


def find_dialect(name: str) -> Dialect:
    """Return the record of a dialect; ConfigError for any other name."""
    if name not in DIALECTS:
        raise ConfigError("unknown dialect", got=repr(name), expected=f"{AUTO}, " + ", ".join(sorted(DIALECTS)))
    return DIALECTS[name]
