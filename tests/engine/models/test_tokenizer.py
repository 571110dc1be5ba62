"""A folder whose tokenizer is missing or damaged is refused in one line, never opened with an empty one."""

import shutil

import pytest

from tests.engine.pieces import model_folder
from topkd.compose.bulk.job import load_text_tokenizer
from topkd.engine.models.tokenizer import load_tokenizer
from topkd.topk.errors import ConfigError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("tokenizer") / "m")


def _without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def _holding(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize("load", [load_tokenizer, load_text_tokenizer])
@pytest.mark.parametrize(
    ("harm", "got"),
    [
        (_without("tokenizer.json", "tokenizer_config.json"), "no token but special ones; put the model's"),
        (_without("tokenizer.json"), "no token but special ones; put the model's"),
        (_holding("tokenizer.json", "{"), "Expecting property name"),
        (_holding("tokenizer.json", "{}"), "KeyError: 'added_tokens'"),
        (_holding("tokenizer_config.json", "[]"), "AttributeError: 'list' object"),
    ],
)
def test_a_folder_without_a_whole_tokenizer_is_refused_in_one_line(whole, tmp_path, load, harm, got):
    shutil.copytree(whole, tmp_path / "m")
    harm(tmp_path / "m")
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path / "m"))
    message = str(caught.value)
    assert message.startswith(f"cannot load a tokenizer from {str(tmp_path / 'm')!r} (folder): got {got}")
    assert "\n" not in message


def test_a_whole_one_is_opened_and_none_is_none(whole):
    assert load_tokenizer(str(whole)).encode("ab")
    assert load_text_tokenizer(None) is None
