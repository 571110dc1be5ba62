"""What every HTTP dialect shares: an endpoint, a model name found once, server facts, metrics, clean closing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self, TypedDict, Unpack

import msgspec
from pydantic import SecretStr

from topkd.clients.config import ClientConfig
from topkd.clients.decoding.vllm_typed import typed
from topkd.clients.http.admission import MemoryBudget
from topkd.clients.http.endpoint import Endpoint
from topkd.clients.http.metrics import Metrics
from topkd.clients.http.transport import Transport
from topkd.topk.errors import ConfigError, ModelNotFoundError, RequestRefusedError, ResponseError, ServerFailedError
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import TopK

if TYPE_CHECKING:
    from topkd.clients.dialects.raw_requests import ServerFacts


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says about itself. ``max_model_len`` None and ``version`` "" are: it does not say."""

    model: str
    max_model_len: int | None
    version: str
    models: tuple[str, ...] = ()


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    parent: str | None = None  # of an adapter: the model under it


class _Models(msgspec.Struct):
    data: list[_Card]


class _Version(msgspec.Struct):
    version: str = ""


_FACTS_S = 15.0  # of a try: nothing has to be computed for a list of models, and a server that hangs is seen by it
_MODELS = msgspec.json.Decoder(_Models)
_VERSION = msgspec.json.Decoder(_Version)


class ClientOptions(TypedDict, total=False):
    """Options of every client.

    Attributes:
        model: Served name; None takes the only one the server has.
        api_key: ``"env:NAME"``, ``"file:PATH"``, a key, or None.
        config: Time-outs, retries and bounds.
        vocab_size: Ids outside it are refused, in requests and replies.
        budget: Shared with other clients.
        metrics: Shared likewise.
        transport: In place of httpx.
    """

    model: str | None
    api_key: str | SecretStr | None
    config: ClientConfig | None
    vocab_size: int | None
    budget: MemoryBudget | None
    metrics: Metrics | None
    transport: Transport | None


class HttpClient:
    """Base of the HTTP dialects; subclasses add pure build and parse functions and the methods that join them."""

    dialect: ClassVar[str] = ""

    def __init__(self, base_url: str, **options: Unpack[ClientOptions]) -> None:
        self._model, self.vocab_size = options.get("model"), options.get("vocab_size")
        self.metrics_ = options.get("metrics") or Metrics()
        self.endpoint = Endpoint(
            base_url,
            api_key=options.get("api_key"),
            config=options.get("config"),
            budget=options.get("budget"),
            metrics=self.metrics_,
            transport=options.get("transport"),
        )

    @classmethod
    async def matches(cls, server: ServerFacts) -> bool:  # noqa: ARG003 - subclasses ask
        """Whether a server speaks this dialect, by which routes answer: a few GETs, no tokens."""
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint.url!r}, model={self._model!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes connections and threads."""
        await self.endpoint.aclose()

    @property
    def metrics(self) -> dict[str, float]:
        """Counters so far: tries, retries, bytes, window cuts, zero-probability sentinels, refused replies, ..."""
        return self.metrics_.snapshot() | {
            "window": float(self.endpoint.gate.window.size),
            "in_flight": float(self.endpoint.gate.window.in_flight),
        }

    def where(self, request: str = "") -> str:
        """Endpoint, model and request, for error messages."""
        return ", ".join(
            part for part in (self.endpoint.url, f"model {self._model}" if self._model else "", request) if part
        )

    def under(self, model: str) -> Self:
        """The same connections, window and counters under another served name: an adapter that was loaded later."""
        other = copy.copy(self)
        other._model = model  # noqa: SLF001 - our own copy
        return other

    async def model_name(self) -> str:
        """The served name: the one given, or the server's only one."""
        if self._model is None:
            cards = await self._cards()
            if len(cards) != 1:
                raise ConfigError(
                    "the server has no single model; say which",
                    where=self.endpoint.url,
                    got=", ".join(card.id for card in cards) or "no model",
                    hint="model=...",
                )
            self._model = cards[0].id
        return self._model

    async def server_info(self) -> ServerInfo:
        """Model, context length and version, from ``/v1/models`` and ``/version``."""
        name = await self.model_name()
        cards = await self._cards()
        names = tuple(card.id for card in cards)
        mine = [card for card in cards if card.id == name]
        if not mine:
            raise ModelNotFoundError(
                f"the server has no model {name!r}", where=self.endpoint.url, got=", ".join(names) or "no model"
            )
        return ServerInfo(name, mine[0].max_model_len, await self.server_version(), names)

    async def server_version(self) -> str:
        """What ``GET /version`` says; "" on a server without that route."""
        try:
            return (
                await self.endpoint.call(
                    "GET",
                    "/version",
                    decode=lambda body: typed(body, _VERSION),
                    where=self.where(),
                    within_s=_FACTS_S,
                )
            ).version
        except (RequestRefusedError, ResponseError, ServerFailedError):
            return ""

    async def healthy(self) -> bool:
        """One short try of ``GET /health``, outside admission and retries."""
        return await self.endpoint.ping("/health")

    async def _cards(self) -> list[_Card]:
        reply = await self.endpoint.call(
            "GET",
            "/v1/models",
            decode=lambda body: typed(body, _MODELS),
            where=self.where("GET /v1/models"),
            within_s=_FACTS_S,
        )
        return reply.data

    def _note(self, topk: TopK, zeros: int) -> None:
        self.metrics_.add("scored_requests")
        self.metrics_.add("scored_rows", topk.rows)
        if zeros:
            self.metrics_.add("zero_probability_sentinels", zeros)


class ScoringClient(HttpClient):
    """A client that scores given ids: it can teach, and draws completions too."""

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Return rows ``start .. len(ids) - 2`` with the K most probable tokens and each realised logprob."""
        raise NotImplementedError

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Return n completions with the exact logprobs they were sampled with."""
        raise NotImplementedError
