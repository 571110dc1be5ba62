"""What each side reads: templates of their own, privileged context, conversations with masks, teachers by column."""

import json

import numpy as np
import pytest

from tests.fakes.tinymodels import make_tokenizer
from topkd.compose.config.tables import PrivilegedConfig
from topkd.compose.data.chat_templates import Side
from topkd.compose.data.conversations import Conversation
from topkd.compose.data.prompts import Readers, read_prompts
from topkd.compose.data.sequences import read_sequences
from topkd.topk.errors import ConfigError, DataError

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TALK = [
    {"role": "system", "content": "short answers"},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and 2 + 2?"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(600)


def read(tmp_path, lines, readers, name="data.jsonl", **more):
    path = tmp_path / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_prompts(path, readers, **{"max_tokens": 512, "overlong": "error", **more})


def test_parquet_and_saved_datasets_give_the_rows_that_jsonl_gives(tmp_path, tokenizer):
    import datasets

    lines = [
        {"messages": TALK, "id": "a", "teacher_id": "t", "answer": "4"},
        {"prompt": "x =", "hint": "it is 3", "id": "b"},
        {"prompt_ids": [5, 6], "completion_ids": [7], "id": "c"},
    ]
    columns = sorted({key for line in lines for key in line})
    table = datasets.Dataset.from_list(
        [{key: line.get(key) for key in columns} for line in lines]
    )  # every column in every row, most of them null
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    readers = Readers(Side(tokenizer))
    expected, _ = read(tmp_path, lines, readers)
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        rows, _ = read_prompts(path, readers, max_tokens=512, overlong="error")
        for row, wanted in zip(rows, expected, strict=True):
            assert (row.sample_id, row.teacher_id) == (wanted.sample_id, wanted.teacher_id)
            assert row.prompt_ids.tolist() == wanted.prompt_ids.tolist()
            assert row.teacher_prompt_ids.tolist() == wanted.teacher_prompt_ids.tolist()
            completions = [None if r.completion_ids is None else r.completion_ids.tolist() for r in (row, wanted)]
            assert completions[0] == completions[1]
        assert rows[0].columns["answer"] == "4"


def test_thinking_is_off_on_one_side_only(tmp_path, tokenizer):
    ask = [{"messages": TALK[:2]}]
    off, on = Side(tokenizer, THINKING, {"enable_thinking": False}), Side(tokenizer, THINKING)
    (row,), _ = read(tmp_path, ask, Readers(off, {"": on}))
    student, teacher = tokenizer.decode(row.prompt_ids), tokenizer.decode(row.teacher_prompt_ids)
    assert student == teacher + "<think>\n\n</think>\n\n"
    assert row.prompt_ids.size != row.teacher_prompt_ids.size


def test_each_kind_of_privileged_context_stands_where_its_template_says(tmp_path, tokenizer):
    ask = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is {x}?"}]
    readers = Readers(Side(tokenizer), None, PrivilegedConfig(reference="{prompt} [known: {reference}]"))
    rows, _ = read(
        tmp_path,
        [
            {"messages": ask, "hint": "think of {y}"},
            {"messages": ask, "reference": "42"},
            {"prompt": "what is {x}?", "reference": "42", "hint": "a number"},
            {"messages": ask, "feedback": "it was too long"},
            {"prompt_ids": [9, 8], "teacher_prompt_ids": [7, 7, 7]},
        ],
        readers,
    )
    plain = tokenizer.decode(rows[0].prompt_ids)
    assert [tokenizer.decode(row.prompt_ids) == plain for row in rows] == [True, True, False, True, False]
    told = [tokenizer.decode(row.teacher_prompt_ids) for row in rows]
    assert "<|im_start|>system\nthink of {y}\n\nbe brief<|im_end|>" in told[0]
    assert told[0].count("<|im_start|>system") == 1
    assert "<|im_start|>user\nwhat is {x}? [known: 42]<|im_end|>" in told[1]
    assert told[2] == "a number\nwhat is {x}? [known: 42]"
    assert "it was too long" in told[3]
    assert told[3].count("<|im_start|>user") == 1
    assert rows[4].teacher_prompt_ids.tolist() == [7, 7, 7]


def test_of_a_conversation_the_last_answer_or_all_of_them_train(tmp_path, tokenizer):
    (last,), _ = read(tmp_path, [{"messages": TALK}], Readers(Side(tokenizer)))
    assert tokenizer.decode(last.completion_ids) == "four<|im_end|>"
    assert tokenizer.decode(last.prompt_ids).endswith("and 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert last.completion_mask is None
    (every,), _ = read(tmp_path, [{"messages": TALK}], Readers(Side(tokenizer), turns="all"))
    assert tokenizer.decode(every.prompt_ids).endswith("1 + 1?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(every.completion_ids[every.completion_mask]) == "two<|im_end|>four<|im_end|>"
    between = tokenizer.decode(every.completion_ids[~every.completion_mask])
    assert between == "\n<|im_start|>user\nand 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert [*every.prompt_ids, *every.completion_ids] == whole[: len(every.prompt_ids) + len(every.completion_ids)]


def test_scoring_and_training_cut_an_answer_at_the_same_ids(tmp_path, tokenizer):
    (row,), _ = read(tmp_path, [{"messages": TALK}], Readers(Side(tokenizer)))
    (item,) = read_sequences(tmp_path / "data.jsonl", tokenizer)
    assert item.ids.tolist() == [*row.prompt_ids, *row.completion_ids]
    assert item.start == row.prompt_ids.size - 1


@pytest.mark.parametrize("told", [{}, {"hint": "add"}, {"reference": "4"}, {"feedback": "no", "hint": "add"}])
def test_scoring_asks_about_the_prompt_that_the_teacher_of_a_run_sees(tmp_path, tokenizer, told):
    (row,), _ = read(tmp_path, [{"messages": TALK, **told}], Readers(Side(tokenizer)))
    (item,) = read_sequences(tmp_path / "data.jsonl", tokenizer)
    assert item.ids.tolist() == [*row.teacher_prompt_ids, *row.completion_ids]
    assert item.start == row.teacher_prompt_ids.size - 1


def test_sampled_ids_are_kept_as_they_were_whatever_their_text_would_give(tokenizer):
    letters = [int(tokenizer.convert_tokens_to_ids(letter)) for letter in "return"]
    assert tokenizer("return", add_special_tokens=False)["input_ids"] != letters  # another cut of the same text
    talk = Conversation(Side(tokenizer), TALK[:2])
    talk.answer("return", [*letters, tokenizer.eos_token_id])
    talk.say(TALK[3:4])
    assert talk.ids[talk.mask].tolist() == [*letters, tokenizer.eos_token_id]
    assert "assistant\nreturn<|im_end|>\n<|im_start|>user\nand 2 + 2?<|im_end|>\n" in tokenizer.decode(talk.ids)


def test_an_answer_that_was_cut_short_is_closed_by_the_template_and_its_end_does_not_train(tokenizer):
    talk = Conversation(Side(tokenizer), TALK[:2])
    sampled = tokenizer("twen", add_special_tokens=False)["input_ids"]
    talk.answer("twen", sampled)
    talk.say(TALK[3:4])
    assert talk.ids[talk.mask].tolist() == sampled
    assert "twen<|im_end|>\n<|im_start|>user" in tokenizer.decode(talk.ids)


def test_an_answer_that_ends_a_text_row_has_the_end_token(tmp_path, tokenizer):
    (row,), _ = read(tmp_path, [{"prompt": "x =", "completion": " 3"}], Readers(Side(tokenizer)))
    assert tokenizer.decode(row.completion_ids) == " 3<|im_end|>"
    assert row.completion_ids.dtype == np.int32


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x", "source": "law"}, r"no teacher named 'law' \(.*:1\): expected one of \['code', 'maths'\]"),
        ({"prompt": "x"}, r"the row names no teacher in 'source' \(.*:1\)"),
        ({"prompt": "x", "source": 3}, r"source cannot be read \(.*:1\): got 3"),
        ({"prompt_ids": [1], "feedback": "x", "source": "code"}, r"contains the text of a prompt.*teacher_prompt_ids"),
        ({"prompt": "x", "completion_ids": [1], "source": "code"}, r"completion_ids goes only with prompt_ids"),
        ({"messages": [], "source": "code"}, r"at least one message"),
        ({"messages": TALK[2:3], "source": "code"}, r"a message before the first answer"),
    ],
)
def test_a_row_that_fits_nobody_is_named(tmp_path, tokenizer, line, message):
    side = Side(tokenizer)
    with pytest.raises(DataError, match=message):
        read(tmp_path, [line], Readers(side, {"maths": side, "code": side}, teacher_column="source"))


def test_a_hint_beside_ids_stands_before_them_behind_their_beginning(tmp_path):
    tokenizer = make_tokenizer(600)
    side, prompt = Side(tokenizer), tokenizer("17 * 23 = ", add_special_tokens=False)["input_ids"]
    (plain,), _ = read(tmp_path, [{"prompt_ids": prompt, "hint": "think"}], Readers(side))
    (text,), _ = read(tmp_path, [{"prompt": "17 * 23 = ", "hint": "think"}], Readers(side))
    assert plain.prompt_ids.tolist() == prompt
    assert (
        tokenizer.decode(plain.teacher_prompt_ids) == tokenizer.decode(text.teacher_prompt_ids) == "think\n17 * 23 = "
    )
    assert plain.teacher_prompt_ids[-len(prompt) :].tolist() == prompt
    tokenizer.bos_token = "<|im_start|>"
    begun = [tokenizer.bos_token_id, *prompt]
    (row,), _ = read(tmp_path, [{"prompt_ids": begun, "hint": "think"}], Readers(side))
    assert tokenizer.decode(row.teacher_prompt_ids) == "<|im_start|>think\n17 * 23 = "
    assert row.teacher_prompt_ids[-len(prompt) :].tolist() == prompt


def test_a_teacher_is_chosen_by_any_column(tmp_path, tokenizer):
    side, other = Side(tokenizer), Side(tokenizer, THINKING, {"enable_thinking": False})
    rows, _ = read(
        tmp_path,
        [{"messages": TALK[:2], "source": name} for name in ("maths", "code", "maths")],
        Readers(side, {"maths": side, "code": other}, teacher_column="source"),
    )
    assert [row.teacher_id for row in rows] == ["maths", "code", "maths"]
    assert "<think>" in tokenizer.decode(rows[1].teacher_prompt_ids)
    assert "<think>" not in tokenizer.decode(rows[0].teacher_prompt_ids)


def test_a_template_that_is_absent_or_raises_is_one_line(tmp_path, tokenizer):
    refusing = Side(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"rejects these messages \(.*:1\): got roles must alternate"):
        read(tmp_path, [{"messages": TALK[:2]}], Readers(refusing))
    with pytest.raises(ConfigError, match=r"cannot read the chat template \(/no/such.jinja\): got No such file"):
        Side.of(tokenizer, "/no/such.jinja", {})
