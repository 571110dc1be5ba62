"""A model's name that is no folder here is an error in seconds, whatever the hub's library would try."""

import pytest
from huggingface_hub import constants

from topkd.engine.models import tokenizer
from topkd.engine.models.student import load_causal_lm
from topkd.engine.models.tokenizer import check_there, load_tokenizer
from topkd.topk.errors import ConfigError

PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture
def out_of_reach(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("load", [check_there, load_tokenizer, load_causal_lm])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./models/studnt", r"no such model folder \(./models/studnt\)"),
        ("/models/studnt", r"no such model folder"),
        ("models/tiny/studnt", r"no such model folder"),
        ("models/studnt", r"no such model folder here, and the hub cannot be reached \(models/studnt\): got 127.0.0.1"),
        ("we ird", r"neither a model folder nor a valid hub id \(we ird\)"),
        ("x" * 300, r"neither a model folder nor a valid hub id \(xxx"),
    ],
)
def test_a_name_that_is_nowhere_is_one_line_and_no_retry(out_of_reach, load, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_what_may_be_there_is_left_to_the_library(out_of_reach, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(tokenizer.socket, "create_connection", lambda *a, **k: asked.append(a) or open_nothing())
    check_there(str(tmp_path))
    assert asked == []
    check_there("models/studnt")  # a hub in reach: whether it has the model is its own answer
    assert asked == [(("127.0.0.1", 1),)]
    kept = tmp_path / "models--models--studnt" / "snapshots" / "main"
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(kept / "config.json"))
    check_there("models/studnt")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    for name in PROXIES:
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://127.0.0.1:2")
            check_there("models/studnt")
    assert len(asked) == 1, "kept here, or to be had by another way: nothing is tried from here"


def open_nothing():
    class Closed:
        def close(self):
            pass

    return Closed()
