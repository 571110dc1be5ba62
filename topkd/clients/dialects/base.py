"""Base of the HTTP dialects: an endpoint, a model name found once, server facts, metrics, clean closing.

Besides the clients: ``Wire`` sends single requests outside any dialect; ``ServerFacts`` has the facts that tell
dialects apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypedDict, TypeVar, Unpack
from urllib.parse import urlsplit

import msgspec
from pydantic import SecretStr

from topkd.clients.config import ClientConfig
from topkd.clients.decoding.sampled import SampleRequest
from topkd.clients.decoding.vllm import typed
from topkd.clients.dialects.records import find_dialect
from topkd.clients.http.admission import MemoryBudget
from topkd.clients.http.endpoint import Endpoint, RequestInfo
from topkd.clients.http.metrics import Metrics
from topkd.clients.http.transport import Transport
from topkd.topk.errors import (
    AuthError,
    ConfigError,
    FinalServerError,
    KLimitError,
    ModelNotFoundError,
    RequestRefusedError,
    ResponseError,
    ServerFailedError,
    TopkdError,
    UnsupportedError,
)
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Int32, TopK

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server states about itself. ``max_model_len`` None and ``version`` "": it states none."""

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
_ANY = msgspec.json.Decoder(Any)


class ServerOptions(TypedDict, total=False):
    """Which model of a server to ask, with which key, and how patiently.

    Attributes:
        model: Served name; None takes the only one the server has.
        api_key: ``"env:NAME"``, ``"file:PATH"``, a key, or None.
        config: Time-outs, retries and bounds.
    """

    model: str | None
    api_key: str | SecretStr | None
    config: ClientConfig | None


class ConnectOptions(ServerOptions, total=False):
    """Options of ``connect``.

    Attributes:
        vocab_size: Ids at or past it are refused, in requests and replies; None takes them.
    """

    vocab_size: int | None


class ClientOptions(ConnectOptions, total=False):
    """Options of every client.

    Attributes:
        budget: Shared with other clients.
        metrics: Shared likewise.
        transport: In place of topkd's own ``HttpTransport``.
    """

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
        """Whether the server speaks this dialect, by its host or a few GET requests; the server generates nothing."""
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint.url!r}, model={self._model!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close connections and threads."""
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
        """Copy this client for another served name (an adapter loaded later); connections and counters are shared."""
        other = copy.copy(self)
        other._model = model  # noqa: SLF001 - our own copy
        return other

    async def model_name(self) -> str:
        """Find the served name: the given one, or that of the server's only base model."""
        if self._model is None:
            cards = [card for card in await self._cards() if card.parent is None]
            if len(cards) != 1:
                raise ConfigError(
                    "the server does not serve exactly one model; name the one to use",
                    where=self.endpoint.url,
                    got=", ".join(card.id for card in cards) or "no model",
                    hint="model=...",
                )
            self._model = cards[0].id
        return self._model

    async def server_info(self) -> ServerInfo:
        """Ask for model, context length and version, at ``/v1/models`` and ``/version``."""
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
        """Ask ``GET /version``; "" on a server without that route."""
        try:
            reply = await self.endpoint.call(
                "GET", "/version", decode=lambda body: typed(body, _VERSION), where=self.where(), within_s=_FACTS_S
            )
        except (RequestRefusedError, ResponseError, ServerFailedError):
            return ""
        return reply.version

    async def healthy(self) -> bool:
        """Ask ``GET /health`` once, outside admission and retries."""
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

    async def _ask_scores(
        self, route: str, body: object, decode: Callable[[bytes], Result], *, ids: Int32, k: int, entries: int = 0
    ) -> Result:
        """Send a scoring request; once more after a reply that failed its checks."""
        return await self.endpoint.call(
            "POST",
            route,
            body,
            decode=decode,
            where=self.where(f"{ids.size} tokens, K = {k}"),
            asks=RequestInfo(int(ids.size), entries or int(ids.size) * (k + 1), k=k, model=self._model or ""),
            response_retries=self.endpoint.config.response_retries,
        )

    async def _ask_rollouts(
        self, route: str, body: object, decode: Callable[[bytes], Result], asked: SampleRequest, *, k: int | None = None
    ) -> Result:
        """Send a sampling request for lists of ``k``; the request's own K where it is left out."""
        tokens, prompt = asked.n * asked.params.max_tokens, int(asked.prompt.size)
        k = asked.k if k is None else k
        return await self.endpoint.call(
            "POST",
            route,
            body,
            decode=decode,
            where=self.where(f"{asked.n} x {asked.params.max_tokens} tokens"),
            asks=RequestInfo(
                prompt + asked.params.max_tokens, tokens * (asked.k + 2) + prompt, k=k, model=self._model or ""
            ),
        )

    def _check_k(self, k: int) -> None:
        """Refuse a K above the limit of the dialect before anything is sent."""
        limit = find_dialect(self.dialect).max_k
        if 0 < limit < k:
            what = f"K = {k} is above the limit of the {self.dialect} dialect"
            error = KLimitError(what, where=self.where(), expected=f"K <= {limit}")
            error.limit = limit
            raise error

    def _count_scores(self, topk: TopK, zeros: int = 0) -> None:
        self.metrics_.add("scored_requests")
        self.metrics_.add("scored_rows", topk.rows)
        if zeros:
            self.metrics_.add("zero_probability_sentinels", zeros)

    def _count_rollouts(self, rollouts: list[Rollout], asked: SampleRequest) -> None:
        self.metrics_.add("sampled_requests")
        self.metrics_.add("sampled_tokens", sum(rollout.completion_ids.size for rollout in rollouts))
        if not asked.exact:
            self.metrics_.add("inexact_rollouts", asked.n)


class ScoringClient(HttpClient):
    """A client that scores given ids: it can teach. Most of them draw completions too."""

    async def score(self, ids: Ids, start: int, k: int) -> TopK:  # noqa: ARG002
        """Score rows ``start .. len(ids) - 2``: the K most probable tokens, and each realised logprob."""
        raise UnsupportedError("this client does not say how its dialect scores", where=self.where(), got=self.dialect)

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:  # noqa: ARG002
        """Draw n completions with the exact logprobs they were sampled with; by default an UnsupportedError."""
        raise UnsupportedError("this dialect only scores: it cannot sample", where=self.where(), got=self.dialect)


class Wire:
    """Asks one server. ``requests`` counts what was asked."""

    def __init__(self, client: HttpClient) -> None:
        self.client = client

    @property
    def requests(self) -> int:
        """Count the HTTP exchanges so far, retries included."""
        return int(self.client.metrics_["tries"])

    async def post(
        self, path: str, body: Mapping[str, Any], *, entries: int = 4096, tokens: int = 64, k: int = 0
    ) -> dict[str, Any]:
        """Ask ``POST path`` for a JSON object.

        Raises:
            ServerError: any other status, in the server's words.
            ResponseError: not a JSON object.
        """
        value = await self.client.endpoint.call(
            "POST",
            path,
            dict(body),
            decode=lambda reply: typed(reply, _ANY),
            where=self.client.where(f"POST {path}"),
            asks=RequestInfo(tokens=tokens, entries=entries, k=k),
        )
        if not isinstance(value, dict):
            raise ResponseError("the reply is not a JSON object", where=self.client.where(f"POST {path}"))
        return value

    async def get(self, path: str) -> dict[str, Any] | None:
        """Ask ``GET path`` for a JSON object; None where there is no such thing."""
        value = await self._get(path, lambda reply: typed(reply, _ANY), 0)
        return value if isinstance(value, dict) else None

    async def text(self, path: str) -> str:
        """Ask ``GET path`` for text; "" where there is no such route."""
        return await self._get(path, lambda reply: reply.decode("utf-8", "replace"), 2**14) or ""

    async def _get(self, path: str, decode: Callable[[bytes], Any], entries: int) -> Any:
        try:
            return await self.client.endpoint.call(
                "GET", path, decode=decode, where=self.client.where(f"GET {path}"), asks=RequestInfo(entries=entries)
            )
        except AuthError:
            raise
        except (FinalServerError, ResponseError, ServerFailedError):
            return None

    async def mounted(self, path: str) -> bool:
        """Check that a POST-only route is there: it answers a GET with 405, and a route that is not there with 404.

        Nothing is changed on the server, whatever the route does.
        """
        try:
            await self.client.endpoint.call("GET", path, decode=lambda _: None, where=self.client.where(f"GET {path}"))
        except RequestRefusedError as error:
            return error.got == "HTTP 405"
        except AuthError:
            return True
        except (FinalServerError, ResponseError, ServerFailedError):
            return False
        return True


class ServerFacts:
    """A server whose dialect is not known yet: what its routes state, each asked once."""

    def __init__(self, client: HttpClient) -> None:
        self.client, self.wire = client, Wire(client)
        self._version: str | None = None

    @property
    def host(self) -> str:
        """Return the host of its URL."""
        return urlsplit(self.client.endpoint.url).hostname or ""

    async def version(self) -> str:
        """Ask ``GET /version``; "" without that route."""
        if self._version is None:
            self._version = await self.client.server_version()
        return self._version


def plain(error: TopkdError) -> str:
    """Shorten an error to what happened, without endpoint and advice."""
    return error.what if error.got is None else f"{error.what}: {error.got}"
