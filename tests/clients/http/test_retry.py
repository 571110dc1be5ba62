"""One owner of retries: what is tried again, how long it waits, and when it stops."""

from __future__ import annotations

import pytest

from topkd.clients.config import ClientConfig
from topkd.clients.http.metrics import Metrics
from topkd.clients.http.retry import with_retries
from topkd.clients.http.status_errors import error_from_reply, is_repeating, mark_repeating, read_retry_after_s
from topkd.clients.http.transport import Reply
from topkd.topk.errors import (
    AlignmentError,
    AuthError,
    ContextLimitError,
    KLimitError,
    ModelNotFoundError,
    RequestRefusedError,
    ResponseError,
    ServerBusyError,
    ServerFailedError,
    ServerTimeoutError,
    ServerUnreachableError,
    TopkdError,
    UnsupportedError,
)


class Sleeper:
    def __init__(self) -> None:
        self.pauses: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.pauses.append(seconds)


async def run(errors: list[Exception], config: ClientConfig | None = None, **options) -> tuple[object, Sleeper, list]:
    sleeper, seen = Sleeper(), []

    async def attempt(one):
        seen.append(one)
        if len(seen) <= len(errors):
            raise errors[len(seen) - 1]
        return "answer"

    try:
        result: object = await with_retries(attempt, config or ClientConfig(), Metrics(), sleep=sleeper, **options)
    except TopkdError as error:
        result = error
    return result, sleeper, seen


@pytest.mark.parametrize("kind", [ServerUnreachableError, ServerTimeoutError, ServerBusyError, ServerFailedError])
async def test_what_may_pass_is_tried_again(kind):
    result, sleeper, seen = await run([kind("x"), kind("y")])
    assert result == "answer"
    assert len(sleeper.pauses) == 2
    assert [one.number for one in seen] == [0, 1, 2]
    assert str(seen[2].failure) == "y", "a retry knows why it is one"


@pytest.mark.parametrize(
    "kind",
    [RequestRefusedError, KLimitError, ContextLimitError, ModelNotFoundError, AuthError, ResponseError, AlignmentError],
)
async def test_what_cannot_pass_is_tried_once(kind):
    result, _, seen = await run([kind("x")] * 3)
    assert type(result) is kind
    assert len(seen) == 1
    assert str(result) == "x", "no word of tries when there was one"


async def test_a_bug_is_not_retried():
    with pytest.raises(KeyError):
        await run([KeyError("bug")])


async def test_a_bad_score_reply_has_its_own_allowance():
    result, _, seen = await run([ResponseError("x")] * 3, response_retries=1)
    assert isinstance(result, ResponseError)
    assert len(seen) == 2
    result, _, _ = await run([ResponseError("x")], response_retries=1)
    assert result == "answer"


async def test_tries_are_bounded_and_counted_in_the_message():
    result, sleeper, seen = await run([ServerFailedError("x", hint="h")] * 99, ClientConfig(max_retries=4))
    assert len(seen) == 5
    assert len(sleeper.pauses) == 4
    assert "gave up after 5 tries" in str(result)


async def test_pauses_double_under_a_ceiling_with_full_jitter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("topkd.clients.http.retry.random.uniform", lambda low, high: (low, high)[1])
    config = ClientConfig(max_retries=6, backoff_s=0.5, backoff_max_s=4.0)
    _, sleeper, _ = await run([ServerFailedError("x")] * 9, config)
    assert sleeper.pauses == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    low = []
    monkeypatch.setattr("topkd.clients.http.retry.random.uniform", lambda low_, high: low.append(low_) or 0.0)
    await run([ServerFailedError("x")] * 9, config)
    assert set(low) == {0.0}, "full jitter starts at zero"


async def test_the_servers_own_wish_is_a_floor_and_a_ridiculous_one_ends_it():
    busy = ServerBusyError("x")
    busy.retry_after_s = 7.0
    _, sleeper, _ = await run([busy])
    assert 7.0 <= sleeper.pauses[0] <= 9.0
    busy.retry_after_s = 3600.0
    result, sleeper, seen = await run([busy])
    assert result is busy
    assert len(seen) == 1
    assert not sleeper.pauses


async def test_no_pause_goes_past_the_total_time():
    busy = ServerBusyError("x")
    busy.retry_after_s = 50.0
    result, sleeper, _ = await run([busy], ClientConfig(total_timeout_s=40.0))
    assert result is busy
    assert not sleeper.pauses


async def test_an_error_that_repeats_is_tried_once_more_only():
    result, _, seen = await run([mark_repeating(ServerFailedError("NaN"))] * 9)
    assert isinstance(result, ServerFailedError)
    assert len(seen) == 2
    assert is_repeating(result)


def reply(status: int, body: str, **headers: str) -> Reply:
    return Reply(status, {k.replace("_", "-"): v for k, v in headers.items()}, body.encode())


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (reply(401, '{"error":"Unauthorized"}'), AuthError, "Unauthorized"),
        (reply(403, ""), AuthError, "empty body"),
        (
            reply(
                400, '{"error":{"message":"Requested prompt logprobs of 64, which is greater than max allowed: 20"}}'
            ),
            KLimitError,
            "K <= 20",
        ),
        (
            reply(
                400, '{"error":{"message":"Requested 65 token ids per row, which is greater than max allowed: 64."}}'
            ),
            KLimitError,
            "K <= 64",
        ),
        (
            reply(
                400,
                '{"error":{"message":"The input (9000 tokens) is longer than the model\'s context length (8192)."}}',
            ),
            ContextLimitError,
            "9000 tokens",
        ),
        (
            reply(400, '{"error":{"message":"Please reduce it.","code":"context_length_exceeded"}}'),
            ContextLimitError,
            "reduce it",
        ),
        (
            reply(400, '{"error":{"message":"prompt_logprob_token_ids requires the V2 model runner (X=1)."}}'),
            UnsupportedError,
            "V2 model runner",
        ),
        (
            reply(400, '{"error":{"message":"Unsupported parameter: \'logprobs\'","code":"unsupported_parameter"}}'),
            UnsupportedError,
            "no logprobs",
        ),
        (
            reply(400, '{"error":{"message":"`logprobs` is not supported with this model"}}'),
            UnsupportedError,
            "no logprobs",
        ),
        (
            reply(429, '{"error":{"message":"You exceeded your quota","code":"insufficient_quota"}}'),
            RequestRefusedError,
            "no quota left",
        ),
        (
            reply(400, '{"error":{"message":"This model\'s maximum context length is 4096 tokens. However, ..."}}'),
            ContextLimitError,
            "maximum context length",
        ),
        (reply(404, '{"error":{"message":"The model `x` does not exist."}}'), ModelNotFoundError, "does not exist"),
        (reply(404, '{"detail":"Not Found"}'), RequestRefusedError, "no such route"),
        (
            reply(400, '{"error":{"message":"Token id 9999 is out of vocabulary"}}'),
            RequestRefusedError,
            "out of vocabulary",
        ),
        (reply(422, '{"object":"error","message":"flat words"}'), RequestRefusedError, "flat words"),
        (reply(429, '{"error":{"message":"slow"}}', retry_after="2"), ServerBusyError, "slow"),
        (reply(503, "<html><title>Maintenance</title></html>"), ServerBusyError, "HTML page titled 'Maintenance'"),
        (reply(502, "\x00\xff bytes"), ServerFailedError, "bytes"),
        (reply(500, "[" * 50_000), ServerFailedError, "failed"),
        (reply(408, ""), ServerTimeoutError, "gave up"),
        (reply(409, ""), ServerFailedError, "failed"),
        (reply(301, ""), RequestRefusedError, "refuses"),
        (
            reply(500, '{"error":{"message":"Out of range float values are not JSON compliant"}}'),
            ServerFailedError,
            "NaN",
        ),
        (
            reply(400, '{"error":{"message":"Out of range float values are not JSON compliant"}}'),
            ServerFailedError,
            "NaN",
        ),
    ],
)
def test_a_status_becomes_the_right_error_with_the_servers_words(answer: Reply, kind, words: str):
    error = error_from_reply(answer, where="http://h, model x", k=64, model="x")
    assert type(error) is kind
    assert words in str(error)
    assert "http://h" in str(error)
    assert len(str(error)) < 1200
    assert is_repeating(error) == ("NaN" in str(error))


def test_the_k_limit_carries_the_servers_number():
    answer = reply(
        400, '{"error":{"message":"Requested sample logprobs of 257, which is greater than max allowed: 256"}}'
    )
    error = error_from_reply(answer, where="")
    assert isinstance(error, KLimitError)
    assert error.limit == 256


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:10 GMT"}, 10.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:27:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "9" * 400}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict, seconds: float | None):
    assert read_retry_after_s(headers, now=1445412480.0) == seconds


def test_a_server_that_says_do_not_retry_is_believed():
    assert is_repeating(error_from_reply(reply(500, "", x_should_retry="false"), where=""))
