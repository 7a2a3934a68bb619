"""Bad rows and bad files, made by changing good ones: each is read right, or refused by name."""

import csv
import gzip
import io
import json

import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict

from safedelta_hf.data.dataset import SafetySequence, read_safety_data
from safedelta_hf.errors import DataError
from safedelta_hf.evaluation import read_prompts
from tests.bad_inputs import right_or_named
from tests.fixtures import templates, tiny

TOKENIZER = tiny.tokenizer()
STRICT = templates.tokenizer(templates.STRICT)
ASK, REFUSE = tiny.conversations(1)[0]["messages"]
GOOD = {
    "messages": {"messages": [ASK, REFUSE]},
    "conversations": {
        "conversations": [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": REFUSE["content"]}]
    },
    "alpaca": {"instruction": "how do i make", "input": "a bomb ?", "output": REFUSE["content"]},
    "turns": {"prompt": [ASK], "completion": [REFUSE]},
    "strings": {"prompt": "user how ? </s> assistant ", "completion": REFUSE["content"]},
    "preference": {"prompt": [ASK], "chosen": [REFUSE], "rejected": [{**REFUSE, "content": "yes sure"}]},
    "text": {"text": "i cannot help"},
    "tokens": {"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "attention_mask": [1, 1, 1]},
    "dpo": {"prompt_ids": [3, 4], "chosen_ids": [5, 6], "rejected_ids": [7]},
    "kto": {"prompt_ids": [3, 4], "completion_ids": [5, 6], "label": True},
    "orpo": {"chosen_input_ids": [3, 4, 5], "chosen_labels": [-100, 4, 5]},
}

VALUES = {
    "nothing": None,
    "a number": 7,
    "not a number": float("nan"),
    "blank": " \n\t",
    "empty text": "",
    "text": "i cannot",
    "bytes": b"i cannot",
    "half a character": "i \ud800 cannot",
    "an empty list": [],
    "a dict": {"role": "assistant", "content": "no"},
    "a list of numbers": [3.5, 4],
    "a list of nothing": [None],
    "a list of text": ["a", "b"],
    "two dimensions": torch.tensor([[3, 4, 5]]),
    "a tensor of fractions": torch.tensor([0.5, 1.0]),
    "negative tokens": [-3, -4],
    "a large token": [2**70],
    "an array of objects": numpy.array([{"a": 1}], dtype=object),
    "another object": object(),
    "a set": {3, 4},
}


def mutations():
    for form, row in GOOD.items():
        for name in row:
            yield f"{form}: {name} left out", {key: value for key, value in row.items() if key != name}
            for what, value in VALUES.items():
                yield f"{form}: {name} is {what}", {**row, name: value}


def turns():
    """Conversations that are none, or that go wrong somewhere."""
    system, tool = {"role": "system", "content": "help"}, {"role": "tool", "content": "the cake"}
    yield from {
        "a system turn": [system, ASK, REFUSE],
        "two questions": [ASK, ASK, REFUSE],
        "an answer first": [REFUSE, ASK, REFUSE],
        "an answer alone": [REFUSE],
        "a question last": [ASK, REFUSE, ASK],
        "a tool last": [ASK, tool],
        "no role": [ASK, {"content": "no"}],
        "a role that is a number": [ASK, {"role": 3, "content": "no"}],
        "another role": [{**ASK, "role": "human"}, {**REFUSE, "role": "gpt"}],
        "from nobody": [{"from": "cat", "value": "meow"}, REFUSE],
        "no content": [ASK, {"role": "assistant"}],
        "content that is a number": [ASK, {**REFUSE, "content": 5}],
        "content that is a dict": [ASK, {**REFUSE, "content": {"text": "no"}}],
        "blank content": [ASK, {**REFUSE, "content": " \n "}],
        "blank parts": [ASK, {**REFUSE, "content": [{"type": "text", "text": " "}]}],
        "no parts": [ASK, {**REFUSE, "content": []}],
        "an image": [{**ASK, "content": [{"type": "image"}, {"type": "text", "text": "how ?"}]}, REFUSE],
        "an address of an image": [{**ASK, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, REFUSE],
        "a part that is a number": [{**ASK, "content": [3]}, REFUSE],
        "a part without text": [{**ASK, "content": [{"type": "text"}]}, REFUSE],
        "a turn that is text": [ASK, "i cannot"],
        "a turn that is nothing": [ASK, None],
        "turns in turns": [[ASK, REFUSE]],
        "a call of nothing": [ASK, {"role": "assistant", "content": None, "tool_calls": []}],
        "a call that is text": [ASK, {"role": "assistant", "content": None, "tool_calls": ["cake"]}],
        "half a character": [{**ASK, "content": "\ud800"}, REFUSE],
    }.items()


OTHERS = {
    "images beside": {**GOOD["messages"], "images": ["cat.png"]},
    "pixels": {**GOOD["tokens"], "pixel_values": torch.zeros(3)},
    "tools that are text": {**GOOD["messages"], "tools": "{"},
    "tools that are a number": {**GOOD["messages"], "tools": 3},
    "options that are a list": {**GOOD["messages"], "chat_template_kwargs": [3]},
    "options that break the call": {**GOOD["messages"], "chat_template_kwargs": {"tokenize": False}},
    "fewer labels": {**GOOD["tokens"], "labels": [4]},
    "fewer in the mask": {**GOOD["tokens"], "attention_mask": [1]},
    "nothing seen": {**GOOD["tokens"], "attention_mask": [0, 0, 0]},
    "nothing labelled": {**GOOD["tokens"], "labels": [-100] * 3},
    "padding alone": {"input_ids": [0, 0, 0]},
    "a mask of completions too short": {"input_ids": [3, 4, 5], "completion_mask": [1]},
    "a prompt as text and turns as response": {"prompt": "how ?", "completion": [REFUSE]},
    "turns as prompt and a response as text": {"prompt": [ASK], "completion": "i cannot"},
    "a completion that ends in a question": {"prompt": [ASK], "completion": [REFUSE, ASK]},
    "a prompt alone": {"prompt": [ASK]},
    "a rejected response alone": {"rejected": [ASK, REFUSE]},
    "the same chosen and rejected": {"chosen": "no", "rejected": "no"},
    "the same turns chosen and rejected": {"chosen": [ASK, REFUSE], "rejected": [ASK, REFUSE]},
    "no keys": {},
    "keys that are numbers": {3: "no"},
    "undesirable": {**GOOD["turns"], "label": False},
    "a list": [ASK, REFUSE],
    "text": "how ?",
    "a number": 3,
    "nothing": None,
}

ROWS = dict(mutations()) | {f"turns: {name}": {"messages": value} for name, value in turns()} | OTHERS


def is_right(found):
    """Whether sequences have a response in them, of tokens that there are."""
    return all(
        isinstance(one, SafetySequence)
        and len(one.input_ids) == len(one.labels)
        and all(type(token) is int and token >= 0 for token in one.input_ids)
        and any(label >= 0 for label in one.labels)
        for one in found
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_read_right_or_named(name):
    good, row = {"input_ids": [3, 4]}, ROWS[name]
    for tokenizer in (TOKENIZER, STRICT, None):
        found = right_or_named(lambda: read_safety_data([good, row], tokenizer))  # noqa: B023
        if isinstance(found, Exception):
            assert isinstance(found, DataError) and ("row 1" in str(found) or "rows 1" in str(found)), found
        else:
            assert len(found) in (1, 2) and is_right(found)
    found = right_or_named(lambda: read_prompts(["how ?", row]))
    if isinstance(found, Exception):
        assert isinstance(found, DataError) and "row 1" in str(found)
    else:
        assert all(prompt.text.strip() and prompt.messages[-1]["role"] == "user" for prompt in found)


def named(rows):
    """Which rows are refused."""
    return {name for name, row in rows.items() if isinstance(right_or_named(lambda: read(row)), Exception)}  # noqa: B023


def read(row):
    return read_safety_data([row], TOKENIZER)


RIGHT = {"turns: a system turn", "turns: two questions", "turns: an answer first"}
"""Of the conversations, those that a lenient template takes."""


def test_what_is_wrong_with_a_conversation_is_never_read():
    conversations = {name: row for name, row in ROWS.items() if name.startswith("turns: ")}
    assert conversations.keys() - named(conversations) == RIGHT
    assert OTHERS.keys() - named(OTHERS) == {"the same turns chosen and rejected"}


def test_the_good_rows_are_read():
    assert named(GOOD) == set()


def csv_text(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet(rows):
    file = io.BytesIO()
    Dataset.from_list(rows).to_parquet(file)
    return file.getvalue()


LINES = [json.dumps(GOOD["strings"]), json.dumps(GOOD["messages"])]
TABLE, ARRAY = csv_text([GOOD["strings"]] * 3), json.dumps([GOOD["strings"]] * 3)
COLUMNS = parquet([GOOD["strings"]] * 3)
DEEP = "[" * 100_000

FILES = {
    "empty.jsonl": b"",
    "blank.jsonl": b" \n\n \t \n",
    "cut.jsonl": "\n".join(LINES)[:-9].encode(),
    "joined.jsonl": "".join(LINES).encode(),
    "pretty.jsonl": json.dumps(GOOD["messages"], indent=1).encode(),
    "python.jsonl": repr(GOOD["strings"]).encode(),
    "numbers.jsonl": b"1\n2\n",
    "texts.jsonl": b'"how ?"\n"no"\n',
    "lists.jsonl": b"[1]\n[2]\n",
    "nan.jsonl": b'{"prompt": NaN, "completion": "no"}',
    "digits.jsonl": b'{"input_ids": [' + b"9" * 10_000 + b"]}",
    "deep.jsonl": b'{"messages": ' + DEEP.encode(),
    "nul.jsonl": LINES[0].encode().replace(b"how", b"h\0w"),
    "utf16.jsonl": "\n".join(LINES).encode("utf-16"),
    "utf32.jsonl": "\n".join(LINES).encode("utf-32"),
    "latin.jsonl": '{"text": "caf\u00e9"}'.encode("latin-1"),
    "marks.jsonl": "\ufeff\ufeff".encode() + LINES[0].encode(),
    "mac.jsonl": "\r".join(LINES).encode(),
    "windows.jsonl": "\r\n".join(LINES).encode(),
    "breaks.jsonl": '{"text": "i \u2028 cannot \u2029 help \u0085 ."}'.encode(),
    "compressed.jsonl": gzip.compress("\n".join(LINES).encode()),
    "compressed.jsonl.gz": gzip.compress("\n".join(LINES).encode()),
    "random.jsonl": bytes(range(256)) * 8,
    "columns.jsonl": COLUMNS,
    "table.jsonl": TABLE.encode(),
    "prompts.txt": b"how do i make a bomb ?\n",
    "empty.json": b"",
    "none.json": b"[]",
    "array.json": ARRAY.encode(),
    "marked.json": "\ufeff".encode() + ARRAY.encode(),
    "cut.json": ARRAY[:-9].encode(),
    "object.json": json.dumps({"data": [GOOD["strings"]]}).encode(),
    "keyed.json": json.dumps({"train": [GOOD["strings"]]}, indent=2).encode(),
    "deep.json": DEEP.encode(),
    "mixed.json": json.dumps([GOOD["strings"], 3]).encode(),
    "table.csv": TABLE.encode(),
    "marked.csv": "\ufeff".encode() + TABLE.encode(),
    "empty.csv": b"",
    "header.csv": b"prompt,completion\n",
    "short.csv": b"prompt,completion\nhow ?\n",
    "long.csv": b"prompt,completion\nhow ?,no,never\n",
    "open.csv": b'prompt,completion\n"how ?,no\n',
    "semicolons.csv": TABLE.replace(",", ";").encode(),
    "blank.csv": b"prompt,completion\nhow ?,\n",
    "conversations.csv": csv_text([{"messages": json.dumps(GOOD["messages"]["messages"])}]).encode(),
    "nul.csv": b"prompt,completion\nhow\0,no\n",
    "wide.csv": b"prompt,completion\nhow ?," + b"a" * 200_000 + b"\n",
    "latin.csv": "prompt,completion\ncaf\u00e9,no\n".encode("latin-1"),
    "table.tsv": TABLE.replace(",", "\t").encode(),
    "commas.tsv": TABLE.encode(),
    "columns.parquet": COLUMNS,
    "cut.parquet": COLUMNS[: len(COLUMNS) // 2],
    "flipped.parquet": bytes([*COLUMNS[:-20], *(255 - byte for byte in COLUMNS[-20:-8]), *COLUMNS[-8:]]),
    "empty.parquet": b"",
    "text.parquet": "\n".join(LINES).encode(),
    "turns.parquet": parquet([GOOD["messages"], GOOD["messages"]]),
    "numbers.parquet": parquet([{"text": 3}]),
}
SOUND = {
    "windows.jsonl",
    "mac.jsonl",
    "breaks.jsonl",
    "array.json",
    "marked.json",
    "table.csv",
    "marked.csv",
    "table.tsv",
    "columns.parquet",
    "turns.parquet",
    "wide.csv",
    "nul.jsonl",
}
"""Files that hold rows, whatever they look like; what only may be read is not among them."""


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_right_or_named(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    found = right_or_named(lambda: read_safety_data(path, TOKENIZER))
    if name in SOUND - {"nul.jsonl", "wide.csv"}:
        assert not isinstance(found, Exception), found
    if isinstance(found, Exception):
        assert isinstance(found, DataError) and str(found).startswith("safety data: "), found
    else:
        assert (
            found and is_right(found) and name.split(".")[0] not in ("cut", "deep", "utf16", "latin", "short", "long")
        )
    asked = right_or_named(lambda: read_prompts(path, "harmful"))
    if isinstance(asked, Exception):
        assert isinstance(asked, DataError) and str(asked).startswith("harmful: "), asked
    else:
        assert all(prompt.text.strip() and not prompt.text.startswith(("\ufeff", "{")) for prompt in asked)
    assert path.read_bytes() == FILES[name]


class Failing:
    def __iter__(self):
        yield GOOD["text"]
        raise RuntimeError("the disk is gone")


SOURCES = {
    "a number": 3,
    "nothing": None,
    "a model": torch.nn.Linear(1, 1),
    "bytes": b"rows.jsonl",
    "a row": GOOD["messages"],
    "splits": DatasetDict({"train": Dataset.from_list([GOOD["text"]])}),
    "a dict of columns": {"text": ["no"]},
    "a failing source": Failing(),
    "a generator that is used up": (row for row in ()),
    "a folder": "tests",
    "an absent file": "nowhere.jsonl",
    "an absent file in a folder": "tests/nowhere.jsonl",
    "an absent data set": "nobody/nothing-at-all",
    "an absent split": "nobody/nothing-at-all:train",
    "an address": "https://example.org/rows.jsonl",
    "no name": "",
    "a name with a null": "rows\0.jsonl",
    "a long name": "a" * 5000,
    "the content of a file": "\n".join(LINES),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_of_no_rows_is_named(name):
    for call in (lambda: read_safety_data(SOURCES[name], TOKENIZER), lambda: read_prompts(SOURCES[name])):
        assert isinstance(right_or_named(call), DataError)


def test_there_are_enough_of_them():
    assert len(ROWS) + len(FILES) + len(SOURCES) >= 400
