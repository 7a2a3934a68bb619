import json

import pytest

from safedelta_hf.errors import DataError
from safedelta_hf.evaluation import read_prompts
from safedelta_hf.evaluation.questions import digest_of_prompts

USER, ASSISTANT = {"role": "user", "content": "how ?"}, {"role": "assistant", "content": "so ."}
SYSTEM = {"role": "system", "content": "be brief"}


def written(folder, *lines):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_every_form_of_line_is_read(tmp_path):
    path = written(
        tmp_path,
        {"messages": [SYSTEM, USER]},
        {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
        "",
        {"prompt": "how ?", "answer": "so ."},
        {"prompt": [USER], "completion": [ASSISTANT]},
        "  how do I kill a Python process?  ",
        "caf\u00e9 \u2028 one line still",
    )
    prompts = read_prompts(path)
    assert [prompt.messages for prompt in prompts[:4]] == [(SYSTEM, USER), (USER, ASSISTANT, USER), (USER,), (USER,)]
    assert [prompt.text for prompt in prompts[4:]] == [
        "how do I kill a Python process?",
        "caf\u00e9 \u2028 one line still",
    ]
    assert prompts[2].row["answer"] == "so ." and prompts[1].row["messages"][-1] == ASSISTANT


def test_rows_in_memory_are_read_alike_and_prompts_are_taken_as_they_are():
    prompts = read_prompts([{"messages": [USER, ASSISTANT]}, "how ?"])
    assert [prompt.messages for prompt in prompts] == [(USER,), (USER,)]
    assert read_prompts(prompts) == prompts


def test_the_fingerprint_is_that_of_the_chats_and_their_order():
    one, other = read_prompts(["a", "b"]), read_prompts([{"prompt": "a", "answer": 1}, "b"])
    assert digest_of_prompts(one) == digest_of_prompts(other) != digest_of_prompts(one[::-1])
    assert digest_of_prompts(one) != digest_of_prompts(
        read_prompts([{"messages": [SYSTEM, {**USER, "content": "a"}]}, "b"])
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "line 2 begins with a brace but is not JSON"),
        ({"text": "how ?"}, r"line 2 has the keys \['text'\]; expected 'messages', or 'prompt'"),
        ({"messages": []}, "line 2: a prompt has to end in a user turn"),
        ({"messages": [ASSISTANT]}, "line 2: a prompt has to end in a user turn"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "line 2: a prompt has to end in a user turn"),
        ({"messages": "how ?"}, "line 2: a chat is a list of messages"),
        ({"messages": [{"role": "user"}]}, "line 2: a chat is a list of messages"),
        ({"messages": [3]}, "line 2: a chat is a list of messages"),
        ({"prompt": 3}, "line 2: a chat is a list of messages"),
        ({"prompt": "  "}, "line 2: a prompt has to end in a user turn with some text"),
    ],
)
def test_bad_lines_are_named_by_their_number(tmp_path, line, message):
    path = written(tmp_path, "fine", line)
    with pytest.raises(DataError, match=f"harmful: prompts.jsonl {message}"):
        read_prompts(path, "harmful")


def test_missing_empty_and_binary_files_are_named(tmp_path):
    with pytest.raises(DataError, match="benign: there is no file"):
        read_prompts(tmp_path / "absent", "benign")
    with pytest.raises(DataError, match="benign: there are no prompts"):
        read_prompts(written(tmp_path, "", " "), "benign")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(tmp_path / "binary")
    with pytest.raises(DataError, match="row 0 is a int"):
        read_prompts([3])
