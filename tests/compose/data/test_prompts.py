"""Data rows to prompts: every accepted form, and the line number of every refused one."""

import json

import numpy as np
import pytest

from tests.fakes.tinymodels import make_tokenizer
from topkd.compose.data.chat_templates import Side
from topkd.compose.data.prompts import Readers, read_prompts
from topkd.compose.data.rows import check_row
from topkd.compose.data.sequences import BadRow, read_sequences
from topkd.topk.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(600)


def rows_of(tmp_path, lines, tokenizer=None, **more):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return read_prompts(path, Readers(Side(tokenizer)), **{"max_tokens": 64, "overlong": "error", **more})


def test_ids_text_and_messages_become_ids(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "def f"}]
    rows, dropped = rows_of(
        tmp_path,
        [{"prompt_ids": [4, 5], "id": 7}, "", {"prompt": "import os", "teacher_id": "t"}, {"messages": messages}],
        tokenizer,
    )
    assert dropped == []
    assert rows[0].prompt_ids.tolist() == rows[0].teacher_prompt_ids.tolist() == [4, 5]
    assert [row.sample_id for row in rows] == ["7", "line 3", "line 4"]
    assert tokenizer.decode(rows[1].prompt_ids) == "import os"
    assert rows[1].teacher_id == "t"
    assert tokenizer.decode(rows[2].prompt_ids) == "<|im_start|>user\ndef f<|im_end|>\n<|im_start|>assistant\n"


def test_a_hint_is_seen_by_the_teacher_only(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "x"}]
    rows, _ = rows_of(tmp_path, [{"prompt": "a =", "hint": "b"}, {"messages": messages, "hint": "secret"}], tokenizer)
    assert tokenizer.decode(rows[0].prompt_ids) == "a ="
    assert tokenizer.decode(rows[0].teacher_prompt_ids) == "b\na ="
    assert "secret" not in tokenizer.decode(rows[1].prompt_ids)
    assert tokenizer.decode(rows[1].teacher_prompt_ids).startswith("<|im_start|>system\nsecret<|im_end|>")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"not a JSON object \(.*data.jsonl:2, column 2\): got 'not json', expected property name"),
        ("[" * 100_000, r"not a JSON object \(.*:2\): got nested too deeply"),
        ('{"prompt_ids": [' + "9" * 5000 + "]}", r"not a JSON object \(.*:2\): got a number with thousands of digits"),
        (
            {"prompt": "a \ud83d"},
            r"prompt cannot be read \(.*:2\): got .*, expected text without half a character",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud83d"}]},
            r"messages cannot be read \(.*:2\): got .*, expected text without half a character",
        ),
        ({"text": "x"}, r"exactly one of prompt_ids, prompt, messages \(.*:2\): got none"),
        ({"prompt": "x", "prompt_ids": [1]}, r"exactly one of.*:2\)"),
        ({"prompt_ids": ["1"]}, r"prompt_ids.0 cannot be read \(.*:2\)"),
        ({"prompt_ids": []}, r"at least one token.*:2\)"),
        ({"prompt_ids": [1, -4]}, r"no negative id \(.*:2\)"),
        ({"prompt_ids": [1, 2**32 + 5]}, r"out of range \(.*:2\): got 4294967301"),
        ({"prompt_ids": [1] * 65}, r"prompt too long \(.*:2\): got 65 tokens, expected at most 64"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path, [{"prompt_ids": [1]}, line])


def test_a_message_nested_as_deeply_as_python_goes_is_a_bad_row():
    content = []
    for _ in range(5000):
        content = [content]
    with pytest.raises(DataError, match=r"messages cannot be read \(x:1\): got .*, expected a value with fewer nested"):
        check_row({"messages": [{"role": "user", "content": content}]}, "x:1")


def test_overlong_rows_are_dropped_and_counted_when_asked(tmp_path):
    rows, dropped = rows_of(tmp_path, [{"prompt_ids": [1] * 65}, {"prompt_ids": [2]}], overlong="drop")
    assert (len(rows), dropped) == (1, ["line 1"])
    with pytest.raises(DataError, match="no usable prompt"):
        rows_of(tmp_path, [{"prompt_ids": [1] * 65}], overlong="drop")


def test_a_sampled_token_of_probability_zero_is_a_bad_row_and_an_unknown_one_is_not(tmp_path):
    path = tmp_path / "sampled.jsonl"
    row = '{"prompt_ids": [1, 2], "completion_ids": [3, 4], "logp": [-0.5, %s]}\n'
    path.write_text("".join(row % value for value in ("-Infinity", "-9999.0", "NaN", "-800.0")))
    items = list(read_sequences(path))
    assert [isinstance(item, BadRow) for item in items] == [True, True, False, False]
    assert all("cannot have had probability zero" in str(item.reason) for item in items[:2])
    assert np.isnan(items[2].logp[1])
