"""Keys: from the environment or a file, and in no message, log line, metric or config."""

from __future__ import annotations

import logging
import pickle
import traceback
from pathlib import Path

import pytest

from tests.faults.server import KEY, FaultyServer
from topkd.clients import ClientConfig, VllmCompletions
from topkd.clients.http.endpoint import load_key
from topkd.topk.errors import ConfigError, TopkdError


def test_a_key_comes_from_the_environment_a_file_or_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    path = tmp_path / "key"
    path.write_text(KEY + "\nsecond line\n")
    for source in ("env:TEACHER_KEY", f"file:{path}", KEY, f" {KEY}\n"):
        key = load_key(source)
        assert key.get_secret_value() == KEY
        assert KEY not in repr(key) + str(key)
    assert load_key(None) is None
    assert load_key("") is None


def test_a_missing_source_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        load_key("env:NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="nothing-here"):
        load_key(f"file:{tmp_path}/nothing-here")


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it():
    with pytest.raises(ConfigError) as caught:
        load_key("sk-bad\x00key")
    assert "sk-bad" not in str(caught.value)


@pytest.mark.parametrize(
    "fault", ["500", "429_tomorrow", "html_200", "nan", "reset_mid_body", "no_http", "row_short", "401"]
)
async def test_no_output_of_a_failed_run_holds_the_key(fault: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    config = ClientConfig(max_retries=1, backoff_s=0.0)
    async with FaultyServer(lambda n, r: fault) as server:
        if fault == "401":
            server.redirect_to = server.url
        async with VllmCompletions(server.url, api_key=KEY, model="t", config=config) as client:
            with pytest.raises(TopkdError) as caught:
                await client.score(list(range(40)), 3, 4)
            outputs = [
                "".join(traceback.format_exception(caught.value)),
                repr(caught.value.__dict__),
                repr(client),
                repr(client.endpoint),
                repr(client.metrics),
                client.endpoint.config.model_dump_json(),
                caplog.text,
            ]
            assert any(h.get("authorization") == f"Bearer {KEY}" for h in server.headers), "the key was really used"
        for output in outputs:
            assert KEY not in output
        assert KEY.encode() not in pickle.dumps(caught.value)
