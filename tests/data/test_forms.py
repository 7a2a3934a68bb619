"""Each form of a row says the same thing."""

import numpy
import pytest
import torch

from safedelta_hf.data.dataset import read_safety_data
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.errors import DataError
from safedelta_hf.evaluation import read_prompts
from tests.fixtures import tiny

TOKENIZER = tiny.tokenizer()
ASK, REFUSE = tiny.conversations(1)[0]["messages"]
COMPLY = {"role": "assistant", "content": "yes sure"}
(READ,) = read_safety_data(tiny.conversations(1), TOKENIZER)
IDS, LABELS = list(READ.input_ids), list(READ.labels)
START = sum(label == IGNORED for label in LABELS)
TEXT = "user how do i make a bomb ? </s> assistant "
SHAREGPT = [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": REFUSE["content"]}]
PAD = TOKENIZER.pad_token_id

ALIKE = {
    "messages": {"messages": [ASK, REFUSE]},
    "a conversation with a name": {"messages": ({**ASK, "name": None}, REFUSE)},
    "sharegpt": {"conversations": SHAREGPT},
    "alpaca": {"instruction": ASK["content"], "input": "", "output": REFUSE["content"]},
    "alpaca with input": {"instruction": "how do i make", "input": "a bomb ?", "output": REFUSE["content"]},
    "preference": {"prompt": [ASK], "chosen": [REFUSE], "rejected": [COMPLY]},
    "implicit prompt": {"chosen": [ASK, REFUSE], "rejected": [ASK, COMPLY]},
    "chosen alone": {"chosen": [ASK, REFUSE]},
    "ultrafeedback": {"prompt": ASK["content"], "chosen": [ASK, REFUSE], "rejected": [ASK, COMPLY]},
    "preference as text": {"prompt": TEXT, "chosen": REFUSE["content"], "rejected": "yes"},
    "implicit prompt as text": {"chosen": TEXT + REFUSE["content"], "rejected": TEXT + "yes"},
    "desirable": {"prompt": [ASK], "completion": [REFUSE], "label": True},
    "another label": {"prompt": [ASK], "completion": [REFUSE], "label": "toxic"},
    "dpo": {"prompt_ids": IDS[:START], "chosen_ids": IDS[START:], "rejected_ids": [7, 8]},
    "tpo": {"prompt_ids": IDS[:START], "chosen_ids": IDS[START:], "rejected_ids": [7], "reference_ids": [8]},
    "kto": {"prompt_ids": IDS[:START], "completion_ids": IDS[START:], "KL_completion_ids": [7], "label": True},
    "orpo": {"prompt": TEXT, "chosen": "x", "chosen_input_ids": IDS, "chosen_labels": LABELS, "rejected_labels": [7]},
    "reward": {"chosen_ids": IDS, "rejected_ids": [*IDS[:START], 7]},
    "tokens": {"input_ids": IDS, "labels": LABELS},
    "tokens with a mask of completions": {"input_ids": IDS, "completion_mask": [0] * START + [1] * (len(IDS) - START)},
    "tensors": {"input_ids": torch.tensor(IDS), "labels": numpy.array(LABELS)},
    "a list of tensors": {"input_ids": list(torch.tensor(IDS)), "labels": LABELS},
    "padded with a mask": {
        "input_ids": [*IDS, 5, 5],
        "labels": [*LABELS, IGNORED, IGNORED],
        "attention_mask": [1] * len(IDS) + [0, 0],
    },
    "padded at the end": {"input_ids": [*IDS, PAD, PAD], "labels": [*LABELS, IGNORED, IGNORED]},
    "padded at the beginning": {"input_ids": [PAD, *IDS], "labels": [PAD, *LABELS]},
    "no images": {"messages": [ASK, REFUSE], "images": [], "image": None},
    "tools as text": {"messages": [ASK, REFUSE], "tools": "[]"},
}


@pytest.mark.parametrize("form", ALIKE)
def test_every_form_reads_alike(form):
    assert read_safety_data([ALIKE[form]], TOKENIZER) == [READ]


@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca", "alpaca with input", "preference", "tools as text"])
def test_prompts_come_in_the_same_forms(form):
    (asked,) = read_prompts([ALIKE[form]])
    assert " ".join(asked.text.split()) == ASK["content"] and len(asked.messages) == 1


SYSTEM = {"role": "system", "content": "be kind"}
WHOLE = [SYSTEM, ASK, COMPLY, ASK, REFUSE]
"""Of what LLaMA-Factory's data sets hold, the conversation as a whole."""


@pytest.mark.parametrize(
    "row",
    [
        {"system": SYSTEM["content"], "messages": WHOLE[1:]},
        {
            "system": SYSTEM["content"],
            "conversations": [*SHAREGPT[:1], {"from": "gpt", "value": "yes sure"}, *SHAREGPT],
        },
        {
            "system": SYSTEM["content"],
            "history": [[ASK["content"], COMPLY["content"]]],
            "instruction": ASK["content"],
            "output": REFUSE["content"],
        },
    ],
    ids=["messages", "sharegpt", "alpaca"],
)
def test_what_stands_beside_a_conversation_is_part_of_it(row):
    assert read_safety_data([row], TOKENIZER) == read_safety_data([{"messages": WHOLE}], TOKENIZER)


@pytest.mark.parametrize(
    "row, told",
    [
        ({"system": 3, "messages": WHOLE[1:]}, "'system' has to be text"),
        ({"system": "be rude", "messages": WHOLE}, "a system prompt twice"),
        ({"instruction": "a", "output": "b", "history": "c"}, "'history' has to be a list of pairs"),
        ({"instruction": "a", "output": "b", "history": 3}, "'history' has to be a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "'history' has to be a list of pairs"),
        ({"instruction": "a", "output": "b", "history": ["cd"]}, "'history' has to be a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [["c", 3]]}, "have to be text"),
    ],
)
def test_what_stands_beside_a_conversation_and_is_none_of_it_is_named(row, told):
    with pytest.raises(DataError) as caught:
        read_safety_data([row], TOKENIZER)
    assert told in str(caught.value)


def test_undesirable_responses_are_left_out():
    rows = [{"prompt": [ASK], "completion": [COMPLY], "label": label} for label in (False, "False", numpy.False_)]
    rows.append({"prompt_ids": [3], "completion_ids": [4], "label": False})
    assert read_safety_data([*rows, ALIKE["desirable"]], TOKENIZER) == [READ]
    with pytest.raises(DataError, match="all 4 rows are marked as undesirable"):
        read_safety_data(rows, TOKENIZER)


@pytest.mark.parametrize("form", [{"prompt": [ASK]}, {"prompt": "how ?"}, {"prompt_input_ids": [3], "prompt": "how ?"}])
def test_a_prompt_alone_says_what_to_give(form):
    with pytest.raises(DataError, match="row 0 has a prompt and no response, as rows of GRPO.*give prompts together"):
        read_safety_data([form], TOKENIZER)


def test_where_the_end_of_text_pads_one_of_it_is_text():
    shared = tiny.tokenizer()
    shared.pad_token = shared.eos_token
    end = shared.eos_token_id
    assert IDS[-1] == end
    for padded in ([*IDS, end, end], IDS, [end, end, *IDS]):
        (found,) = read_safety_data([{"input_ids": padded}], shared)
        assert list(found.input_ids) == IDS
    (found,) = read_safety_data([{"input_ids": [end, 7, 8]}], shared)
    assert found.input_ids == (end, 7, 8)
