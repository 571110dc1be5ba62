"""State that the questions of a probe share: the client, the facts known so far, and the findings in order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from topkd.clients.decoding.byte_map import ByteMap
from topkd.clients.dialects.base import HttpClient, ServerInfo, Wire, plain
from topkd.clients.probe.findings import Capabilities, Finding, Status
from topkd.topk.errors import AuthError, ServerTimeoutError, ServerUnreachableError, TopkdError
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Int32, TopK

# Letters outside ASCII, digits, code and an emoji: where tokenizers of one family begin to differ.
TEXT = "The capital of France is Paris.\n\tdef naïve(x): return x + 1024  # 東京 🙂\n"
SERVER, SCORING, SAMPLING, TOKENS, OPERATION = "server", "scoring", "sampling", "tokens", "operation"
GROUPS = (SERVER, SCORING, SAMPLING, TOKENS, OPERATION)


class Teacher(Protocol):
    """A client that can be probed."""

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Score, as ``TeacherScorer``."""
        ...

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Draw, as ``Sampler``."""
        ...


@dataclass
class Session:
    """One probe under way.

    Attributes:
        client: The HTTP client under it all.
        teacher: The same object as scorer and sampler.
        wire: For raw questions.
        info: What the server says about itself.
        prompt: int32 [P], what is scored and sampled from.
        student: Byte map of the student's tokenizer, when given.
        capabilities: Filled in as findings come.
        findings: In order.
        seen_ids: Token ids that occurred in replies.
        decoded: id -> how the server spells it, where it does.
    """

    client: HttpClient
    teacher: Teacher
    wire: Wire
    info: ServerInfo
    prompt: Int32
    student: ByteMap | None = None
    capabilities: Capabilities = field(default_factory=Capabilities)
    findings: list[Finding] = field(default_factory=list)
    seen_ids: set[int] = field(default_factory=set)
    decoded: dict[int, str] = field(default_factory=dict)
    _question: tuple[str, str, str] = ("", "", "")

    def add(  # noqa: PLR0917 - a row of a table, written where it is found
        self, key: str, group: str, title: str, status: Status, value: str, detail: str = ""
    ) -> None:
        """Add a finding."""
        self.findings.append(Finding(key, group, title, status, value, detail))

    def report(self, status: Status, value: str, detail: str = "") -> None:
        """Add the answer to the question under way."""
        self.add(*self._question, status, value, detail)

    async def report_sync(self, ways: Mapping[str, tuple[str, tuple[str, ...]]], without: str = "") -> None:
        """Report which ways for new weights are there, by the routes of each."""
        found = [way for way, (_, routes) in ways.items() if all([await self.wire.mounted(route) for route in routes])]
        self.know(sync=tuple(found))
        value = f"{len(found)} way{'s' if len(found) > 1 else ''}" if found else "no route"
        names = ", ".join(ways[way][0] for way in found)
        self.report("info", value, f"mounted, not called: {names}" if found else without)

    def know(self, **facts: Any) -> None:
        """Record capabilities."""
        self.capabilities = replace(self.capabilities, **facts)

    @property
    def k(self) -> int:
        """Choose a K that the server serves, at most 20."""
        limit = self.capabilities.score_k
        return 1 if limit is None else 20 if limit < 0 else max(1, min(20, limit))

    @property
    def scores(self) -> bool:
        """Check that the endpoint was seen to score."""
        return self.capabilities.score_k is not None

    @property
    def sample_k(self) -> int:
        """Choose a K for the lists of a draw: some releases need one place more."""
        limit = self.capabilities.score_k
        return self.k - 1 if limit is not None and self.k == limit > 1 else self.k

    async def ask(
        self,
        key: str,
        group: str,
        title: str,
        question: Callable[[Session], Awaitable[None]],
        *,
        on_error: Status = "unknown",
    ) -> bool:
        """Ask one question; an error of the server's becomes its finding. True when the question was answered.

        A server that is gone, slow beyond its time-out, or closed to our key ends the probe: nothing else could be
        found out.
        """
        self._question = key, group, title
        try:
            await question(self)
        except (ServerUnreachableError, ServerTimeoutError, AuthError):
            raise
        except TopkdError as error:
            self.report(on_error, "error", plain(error))
            return False
        return True
