"""``ClientConfig``: every setting of the HTTP clients, with defaults for one busy server."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Retries = Annotated[int, Field(ge=0)]


class ClientConfig(BaseModel):
    """Time-outs, retries, admission and memory bounds of a client. Frozen; unknown keys are errors.

    A *try* is one HTTP exchange. Its time-out is ``read_timeout_s + read_timeout_per_token_s * tokens`` (prompt tokens
    plus tokens to generate), because prompt scoring time grows with length; all tries and the pauses between them
    share ``total_timeout_s``. Waiting for a server that is paused for new weights is no try, and not part of that time.

    Attributes:
        connect_timeout_s: TCP and TLS set-up.
        read_timeout_s: One try, whatever its size.
        read_timeout_per_token_s: Added to a try for each token scored or generated.
        stall_timeout_s: Silence in the middle of a reply after which its try is given up.
        watchdog_s: Silence of a server with requests under way after which it is asked for a sign of life; without one
            all its tries are given up. 0: never.
        total_timeout_s: All tries of one request and the pauses between them.
        max_retries: Tries after the first.
        response_retries: Of these, after a *score* reply that failed its checks (scoring may be repeated freely).
        pause_timeout_s: Waiting of one request for a server that is paused for new weights, in all. 0: not at all.
        backoff_s: First pause; it doubles, with full jitter.
        backoff_max_s: Longest pause of our own choosing.
        retry_after_max_s: A server that asks for a longer pause is given up at once.
        max_in_flight: Ceiling of the adaptive window, per replica.
        window_start: Requests in flight at the start, per replica.
        window_grow_after: Clean replies for one more in flight, after the first overload.
        window_cooldown_s: One overload event cuts the window once.
        budget_token_k: Tokens x (K + 1) in flight over all replicas; each is about 72 bytes of JSON.
        max_queued: Requests waiting for admission before a call is refused.
        max_reply_bytes: No reply may be larger; most are bounded far lower, by what was asked for.
        decode_workers: Threads that turn replies into arrays.
        keepalive_expiry_s: Below the 5 s after which common servers close idle connections.
        verify_tls: False only for a test server with a self-signed certificate.
        hedge_share: Scores of a fleet, of all, that may be asked of a second replica when they are slower than 95 in
            100; the first answer counts. Replicas differ in the last digits, so the default is 0: never.
        breaker_failures: Failures in a row that open a replica's circuit.
        breaker_cooldown_s: Pause before the single probe of an open circuit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    connect_timeout_s: Positive = 5.0
    read_timeout_s: Positive = 60.0
    read_timeout_per_token_s: Seconds = 0.1
    stall_timeout_s: Positive = 30.0
    watchdog_s: Seconds = 120.0
    total_timeout_s: Positive = 900.0

    max_retries: Retries = 5
    response_retries: Retries = 1
    pause_timeout_s: Seconds = 600.0
    backoff_s: Seconds = 0.5
    backoff_max_s: Seconds = 8.0
    retry_after_max_s: Seconds = 120.0

    max_in_flight: Count = 256
    window_start: Count = 8
    window_grow_after: Count = 32
    window_cooldown_s: Seconds = 1.0
    budget_token_k: Count = 6_000_000
    max_queued: Count = 16_384

    max_reply_bytes: Annotated[int, Field(ge=1024)] = 2**30
    decode_workers: Annotated[int, Field(ge=1, le=64)] = 2
    keepalive_expiry_s: Seconds = 4.0
    verify_tls: bool = True

    hedge_share: Annotated[float, Field(ge=0, le=0.05)] = 0.0
    breaker_failures: Count = 5
    breaker_cooldown_s: Seconds = 5.0

    def try_timeout_s(self, tokens: int) -> float:
        """Return the seconds one try may take when ``tokens`` are to be scored or generated."""
        return self.read_timeout_s + self.read_timeout_per_token_s * tokens

    def reply_bound(self, entries: int) -> int:
        """Return the bytes a reply of ``entries`` (token, logprob) pairs may have: 512 each, seven times the usual."""
        return min(self.max_reply_bytes, 262_144 + 512 * entries)
