"""Mixtures hold what they were asked for, each row labelled as it should be."""

from collections import Counter

import pytest
from datasets import Dataset

from safedelta_hf.errors import ConfigurationError, DataError, SafeDeltaWarning
from safedelta_hf.training import PAPER, balance, derta_rows, mix_safety, refusal_mix
from tests.fixtures import tiny

pytestmark = pytest.mark.filterwarnings("ignore::safedelta_hf.errors.SafeDeltaWarning")

TOKENIZER = tiny.tokenizer()
END = TOKENIZER.eos_token_id
REFUSAL = "i cannot help"


def tokens(count, first, label=True):
    """Tokenised rows that can be told apart."""
    rows = [[first, 3 + n % 20, 4 + n // 20 % 20, 5 + n // 400] for n in range(count)]
    return [{"input_ids": row, "labels": [-100, *row[1:]] if label else row} for row in rows]


def firsts(rows):
    return Counter(row["input_ids"][0] for row in rows)


def ids(text):
    return TOKENIZER(text)["input_ids"]


def chat(*texts):
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.03, 3), (0.2, 25), (0.5, 97 + 3)])
def test_safety_data_make_up_the_share_and_the_task_is_whole(share, count):
    task, safety = tokens(100, 10), tokens(100, 11)
    rows = list(mix_safety(task, safety, share=share, seed=3))
    assert firsts(rows) == Counter({10: 100} | ({11: count} if count else {}))
    known = {tuple(row["input_ids"]): row["labels"] for row in task + safety}
    assert all(known[tuple(row["input_ids"])] == row["labels"] for row in rows)
    assert len({tuple(row["input_ids"]) for row in rows}) == len(rows)


def test_a_mixture_is_in_random_order_and_the_same_for_one_seed():
    first, same, other = (list(mix_safety(tokens(50, 10), tokens(50, 11), share=0.2, seed=n)) for n in (0, 0, 1))
    assert first == same != other
    order = [row["input_ids"][0] for row in first]
    assert order != sorted(order)


def test_too_few_safety_rows_are_named_or_repeated_alike():
    with pytest.raises(DataError, match="safety: 25 are needed and 7 are there"):
        mix_safety(tokens(100, 10), tokens(7, 11), share=0.2)
    rows = mix_safety(tokens(100, 10), tokens(7, 11), share=0.2, repeat=True)
    counts = Counter(tuple(row["input_ids"]) for row in rows if row["input_ids"][0] == 11)
    assert sorted(counts.values()) == [3, 3, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("share", [0.1, 0.048])
def test_more_than_one_in_twenty_warns_of_over_refusal(share, recwarn):
    mix_safety(tokens(100, 10), tokens(20, 11), share=share)
    told = [str(warning.message) for warning in recwarn.list if warning.category is SafeDeltaWarning]
    assert [("over_refusal" in text) for text in told] == ([True] if share > 0.05 else [])


def test_every_form_is_read_and_only_responses_are_trained_on():
    prompt, reply = "how do i make a cake ?", "here is the way"
    forms = [
        chat(prompt, reply),
        {"prompt": chat(prompt)["messages"], "completion": [{"role": "assistant", "content": reply}]},
        {"prompt": f"user {prompt} </s> assistant", "completion": f" {reply}"},
    ]
    before, after = ids(f"user {prompt} </s> assistant"), [*ids(reply), END]
    for form in forms:
        for source in ([form], Dataset.from_list([form])):
            (row,) = mix_safety(source, tokens(1, 11), TOKENIZER, share=0.0)
            assert row["input_ids"] == before + after and row["labels"] == [-100] * len(before) + after
    (text,) = mix_safety([{"text": reply}], tokens(1, 11), TOKENIZER, share=0.0)
    assert text["input_ids"] == text["labels"] == after


def test_rows_of_derta_keep_their_labels_in_a_mixture():
    triple = {"prompt": "how ?", "chosen": " i cannot", "rejected": " sure yes"}
    made = list(derta_rows([triple], TOKENIZER, refusal=REFUSAL))
    mixed = list(mix_safety(tokens(2, 10), made, share=0.5))
    assert all(row in mixed for row in made)


PAIRS = [chat(f"how {word}", "yes sure") for word in ("bomb", "cake", "do", "make", "is", "help")]


@pytest.mark.parametrize("benign_form", ["messages", "prompt", "plain"])
def test_exactly_the_share_is_refused_and_its_end_carries_no_loss(benign_form):
    benign = PAIRS
    if benign_form == "prompt":
        benign = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in PAIRS]
    if benign_form == "plain":
        benign = [
            {"prompt": f"user {row['messages'][0]['content']} </s> assistant", "completion": " yes sure"}
            for row in PAIRS
        ]
    rows = list(refusal_mix(tokens(7, 10), benign, TOKENIZER, refusals=0.3, refusal=REFUSAL))
    refused = [row for row in rows if row["input_ids"][0] != 10]
    assert len(refused) == 3 and len(rows) == 10
    for row in refused:
        assert row["input_ids"][-4:] == [*ids(REFUSAL), END]
        assert row["labels"] == [-100] * (len(row["labels"]) - 4) + ids(REFUSAL) + [-100]
    assert all(row["labels"][-1] != -100 for row in rows if row["input_ids"][0] == 10)
    (with_end, *_) = (
        row
        for row in refusal_mix(tokens(7, 10), benign, TOKENIZER, refusal=REFUSAL, mask_eos=False)
        if row["input_ids"][0] != 10
    )
    assert with_end["labels"][-1] == END


def test_a_template_that_goes_on_after_the_end_of_the_turn_is_masked_from_there():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tail>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("' </s> '", "' </s> <tail> '")
    rows = refusal_mix(tokens(1, 10), PAIRS, tokenizer, refusals=0.5, refusal=REFUSAL)
    (row,) = (row for row in rows if row["input_ids"][0] != 10)
    assert row["labels"][-5:] == [*ids(REFUSAL), -100, -100]


def test_no_row_is_refused_that_is_among_the_normal_ones():
    rows = list(refusal_mix(PAIRS[:5], PAIRS, TOKENIZER, refusals=1 / 6, refusal=REFUSAL))
    refused = [row for row in rows if row["labels"][-1] == -100]
    assert len(rows) == 6 and len(refused) == 1
    assert refused[0]["input_ids"][1:3] == ids(PAIRS[5]["messages"][0]["content"])
    with pytest.raises(DataError, match="benign: 2 are needed and 1 are there"):
        refusal_mix(PAIRS[:5], PAIRS, TOKENIZER, refusals=0.3)


def test_one_turn_of_a_conversation_is_refused_and_the_last_of_it():
    talk = chat("how do i", "yes sure", "make a cake", "here is the way")
    lengths = set()
    for seed in range(20):
        (row,) = (
            row
            for row in refusal_mix(tokens(1, 10), [talk], TOKENIZER, refusals=0.5, refusal=REFUSAL, seed=seed)
            if row["input_ids"][0] != 10
        )
        assert [label for label in row["labels"] if label != -100] == ids(REFUSAL)
        lengths.add(len(row["input_ids"]))
    assert len(lengths) == 2


@pytest.mark.parametrize(
    ("benign", "settings", "error", "message"),
    [
        ([{"text": "yes"}], {}, DataError, "has no reply that could be replaced"),
        (tokens(1, 11), {}, DataError, "has no reply that could be replaced"),
        (PAIRS, {"refusals": 1.0}, ConfigurationError, "refusals=1.0 must be a number of at least 0 and below 1"),
        (PAIRS, {"refusal": ""}, ConfigurationError, "has no words"),
    ],
)
def test_what_refusal_mix_cannot_use_is_named(benign, settings, error, message):
    with pytest.raises(error, match=message):
        refusal_mix(tokens(1, 10), benign, TOKENIZER, **{"refusals": 0.5} | settings)


def test_refusal_mix_warns_of_over_refusal():
    with pytest.warns(SafeDeltaWarning, match="2 benign prompts are refused.*over_refusal"):
        refusal_mix(tokens(2, 10), PAIRS, TOKENIZER, refusals=0.5)


def test_kinds_are_balanced_at_the_ratios_of_the_paper():
    kinds = {"explicit": tokens(200, 11), "intent": tokens(200, 12), "mixed": tokens(200, 13)}
    found = firsts(balance(tokens(600, 10), **kinds))
    assert found == {10: 600, 11: 30, 12: 12, 13: 6}
    assert all(
        found[first] == 600 * PAPER[kind][1] for first, kind in ((11, "explicit"), (12, "intent"), (13, "mixed"))
    )
    few = firsts(balance(tokens(600, 10), explicit=tokens(25, 11)))
    assert few == {10: 600, 11: 25}


def test_too_few_and_too_many_rows_of_a_kind_are_told(recwarn):
    balance(tokens(600, 10), explicit=tokens(25, 11), intent=tokens(12, 12))
    assert not [one for one in recwarn.list if one.category is SafeDeltaWarning]
    with pytest.warns(SafeDeltaWarning, match="19 rows of explicit are fewer than the 20"):
        balance(tokens(600, 10), explicit=tokens(19, 11))
    with pytest.warns(SafeDeltaWarning, match="60 rows of intent are more than the paper found useful.*over_refusal"):
        balance(tokens(600, 10), intent=tokens(70, 12), ratios=dict(PAPER) | {"intent": (0.01, 0.1)})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, DataError, "there are no safety rows"),
        ({"ratios": {"explicit": (0, 1)}}, ConfigurationError, "expected .'explicit', 'intent', 'mixed'."),
        ({"ratios": dict(PAPER) | {"mixed": (0.2, 0.1)}}, ConfigurationError, "at least 0.2 and at most 0.1"),
        ({"ratios": dict(PAPER) | {"mixed": (0, 2)}}, ConfigurationError, r"ratios\['mixed'\]\[1\]=2"),
    ],
)
def test_what_balance_cannot_use_is_named(settings, error, message):
    with pytest.raises(error, match=message):
        balance(tokens(5, 10), **settings)


def test_conversations_without_a_tokenizer_are_named():
    with pytest.raises(ConfigurationError, match="processing_class=None"):
        refusal_mix(PAIRS, PAIRS, None)
    with pytest.raises(DataError, match="task: row 0 is not tokenised and there is no tokenizer"):
        mix_safety(PAIRS, PAIRS)
