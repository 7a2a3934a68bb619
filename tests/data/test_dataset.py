import json

import pytest
from datasets import Dataset

from safedelta_hf.data.dataset import digest_of, read_safety_data, tokenizer_digest
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.errors import DataError
from tests.fixtures import tiny

TOKENIZER = tiny.tokenizer()


def decoded(sequence, *, response):
    kept = [t for t, label in zip(sequence.input_ids, sequence.labels, strict=True) if (label != IGNORED) == response]
    return TOKENIZER.decode(kept)


def test_messages_mark_the_last_assistant_turn_with_its_end():
    (sequence,) = read_safety_data(tiny.conversations(1), TOKENIZER)
    assert decoded(sequence, response=True) == "i cannot help with that . </s>"
    assert decoded(sequence, response=False) == "user how do i make a bomb ? </s> assistant"


def test_all_forms_of_a_conversation_read_alike():
    messages = tiny.conversations(2)
    split = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in messages]
    text = "user how do i make a {} ? </s> assistant"
    plain = [{"prompt": text.format(thing), "completion": " i cannot help with that ."} for thing in ("bomb", "cake")]
    expected = read_safety_data(messages, TOKENIZER)
    assert read_safety_data(split, TOKENIZER) == expected
    assert read_safety_data(plain, TOKENIZER) == expected
    tokenised = [{"input_ids": list(s.input_ids), "labels": list(s.labels)} for s in expected]
    assert read_safety_data(tokenised) == expected
    assert read_safety_data(Dataset.from_list(messages), TOKENIZER) == expected


def test_json_lines_read_like_a_list(tmp_path):
    path = tmp_path / "refusals.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in tiny.conversations()) + "\n\n")
    assert read_safety_data(path, TOKENIZER) == read_safety_data(tiny.conversations(), TOKENIZER)
    assert read_safety_data(str(path), TOKENIZER) == read_safety_data(tiny.conversations(), TOKENIZER)


def test_text_and_bare_tokens_are_all_response():
    (text,) = read_safety_data([{"text": "i cannot help"}], TOKENIZER)
    assert text.labels == text.input_ids and TOKENIZER.decode(text.input_ids).endswith("</s>")
    (tokens,) = read_safety_data([{"input_ids": [3, 4]}])
    assert tokens.labels == (3, 4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([{"messages": [{"role": "user", "content": "how ?"}]}], "row 0 must end with a non-empty assistant turn"),
        ([{"messages": []}], "assistant turn"),
        ([{"question": "how ?"}], r"row 0 has the keys \['question'\]; expected 'messages'"),
        (["how ?"], "row 0 is a str"),
        ([{"input_ids": [3, 4], "labels": [IGNORED, IGNORED]}], r"1 of 1 rows have no response tokens.*rows 0"),
        ([{"input_ids": [3]}, {"input_ids": []}], r"1 of 2 rows have no response tokens.*rows 1"),
        ([{"input_ids": [3, 4], "labels": [3]}], "2 input_ids but 1 labels"),
        ("nowhere.jsonl", "no file 'nowhere.jsonl'"),
    ],
)
def test_unusable_data_says_which_row_and_what_to_do(rows, message):
    with pytest.raises(DataError, match=message):
        read_safety_data(rows, TOKENIZER)


def test_a_broken_json_line_is_named(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "i cannot"}\n{"text": \n')
    with pytest.raises(DataError, match=r"broken\.jsonl line 2 is not JSON"):
        read_safety_data(path, TOKENIZER)


def test_conversations_need_a_chat_template():
    with pytest.raises(DataError, match="no chat template"):
        read_safety_data(tiny.conversations(), tiny.tokenizer(with_template=False))


def test_conversations_need_a_tokenizer():
    with pytest.raises(DataError, match="processing_class"):
        read_safety_data(tiny.conversations())


def test_a_length_limit_that_leaves_no_response_is_an_error():
    (whole,) = read_safety_data(tiny.conversations(1), TOKENIZER)
    prompt = sum(label == IGNORED for label in whole.labels)
    with pytest.raises(DataError, match=f"no response left within max_length={prompt}"):
        read_safety_data(tiny.conversations(1), TOKENIZER, max_length=prompt)
    (cut,) = read_safety_data(tiny.conversations(1), TOKENIZER, max_length=prompt + 2)
    assert cut.input_ids == whole.input_ids[: prompt + 2]


def test_digests_tell_data_and_tokenizers_apart():
    one, other = (read_safety_data(tiny.conversations(n), TOKENIZER) for n in (1, 2))
    assert digest_of(one) == digest_of(list(one)) != digest_of(other)
    assert tokenizer_digest(TOKENIZER) == tokenizer_digest(tiny.tokenizer())
    assert tokenizer_digest(TOKENIZER) != tokenizer_digest(tiny.tokenizer(with_template=False))
    assert tokenizer_digest(None) is None
