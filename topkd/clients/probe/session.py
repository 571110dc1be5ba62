"""What the questions of a probe share: the client, what is known so far, and the findings in the order made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from topkd.clients.decoding.byte_map import ByteMap
from topkd.clients.dialects.base import HttpClient, ServerInfo
from topkd.clients.dialects.raw_requests import Wire, plain
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
        """As ``TeacherScorer``."""
        ...

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """As ``Sampler``."""
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

    def add(  # noqa: PLR0917 - a row of a table, written where it is found
        self, key: str, group: str, title: str, status: Status, value: str, detail: str = ""
    ) -> None:
        """Writes a finding down."""
        self.findings.append(Finding(key, group, title, status, value, detail))

    def know(self, **facts: Any) -> None:
        """Writes capabilities down."""
        self.capabilities = replace(self.capabilities, **facts)

    @property
    def k(self) -> int:
        """A K that the server serves, at most 20."""
        limit = self.capabilities.score_k
        return 1 if limit is None else 20 if limit < 0 else max(1, min(20, limit))

    @property
    def scores(self) -> bool:
        """Whether the endpoint was seen to score."""
        return self.capabilities.score_k is not None

    @property
    def sample_k(self) -> int:
        """A K that a draw can be listed with: some releases need one place more."""
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
        """Runs one question; an error of the server's becomes its finding. True when the question was answered.

        A server that is gone, slow beyond its time-out, or closed to our key ends the probe: nothing else could be
        found out.
        """
        try:
            await question(self)
        except (ServerUnreachableError, ServerTimeoutError, AuthError):
            raise
        except TopkdError as error:
            self.add(key, group, title, on_error, "error", plain(error))
            return False
        return True
