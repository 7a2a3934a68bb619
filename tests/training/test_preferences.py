"""Pairs of replies: read as TRL reads them, drawn without state, told apart token by token."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from safedelta_hf.errors import DataError
from safedelta_hf.training.preferences import (
    contrastive_loss,
    difference_loss,
    draw,
    log_likelihoods,
    read_pairs,
)
from tests.fixtures import tiny


def turn(role, content):
    return [{"role": role, "content": content}]


PLAIN = [
    {"prompt": "how do i make a bomb ? ", "chosen": "i cannot help with that .", "rejected": "yes sure here is"},
    {"prompt": "how do i make ? ", "chosen": "i cannot .", "rejected": "here is the way ."},
    {"prompt": "a cake ? ", "chosen": "i cannot help .", "rejected": "yes"},
]
CONVERSATIONAL = [
    {
        "prompt": turn("user", row["prompt"]),
        "chosen": turn("assistant", row["chosen"]),
        "rejected": turn("assistant", row["rejected"]),
    }
    for row in PLAIN
]


@pytest.mark.parametrize("rows", [PLAIN, CONVERSATIONAL], ids=["plain", "conversational"])
def test_both_replies_follow_the_same_prompt_and_only_they_have_labels(rows):
    tokenizer = tiny.tokenizer()
    for row, pair in zip(rows, read_pairs(rows, tokenizer), strict=True):
        prompts = []
        for column, sequence in zip(("chosen", "rejected"), pair, strict=True):
            said = row[column] if isinstance(row[column], str) else row[column][0]["content"]
            start = next(n for n, label in enumerate(sequence.labels) if label != -100)
            prompts.append(sequence.input_ids[:start])
            assert said.split() == tokenizer.decode(sequence.labels[start:], skip_special_tokens=True).split()
        assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 1 lacks rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "row 1 lacks rejected"),
        ("text", "row 1 lacks prompt, chosen, rejected"),
        ({"prompt": "", "chosen": "yes", "rejected": "yes sure"}, "pairs, chosen: row 1: no token of the reply"),
    ],
)
def test_a_row_that_is_no_pair_is_named(row, said):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=said):
        read_pairs([PLAIN[0], row], tokenizer)


def test_each_pair_comes_once_before_any_comes_again_and_a_batch_depends_on_its_number_alone():
    pairs = list(range(7))
    drawn = [one for number in range(7) for one in draw(pairs, number, 3, seed=1)]
    rounds = [drawn[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(each) == pairs for each in rounds) and len(set(map(tuple, rounds))) > 1
    assert draw(pairs, 4, 3, seed=1) == drawn[12:15]
    assert draw(pairs, 0, 20, seed=1) == drawn[:20]
    assert [draw(pairs, number, 3, seed=2) for number in range(7)] != [draw(pairs, n, 3, seed=1) for n in range(7)]


def by_hand(model, sequence):
    """One reply alone, without padding, token by token."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
    labelled = [(place, label) for place, label in enumerate(sequence.labels) if label != -100 and place]
    return sum(float(logits[place - 1, label]) for place, label in labelled), len(labelled)


def test_losses_are_those_of_each_reply_read_alone():
    model = tiny.llama().double()
    pairs = read_pairs(PLAIN, tiny.tokenizer())
    (safe, safe_tokens), (harm, harm_tokens) = (
        zip(*(by_hand(model, sequence) for sequence in side), strict=True) for side in zip(*pairs, strict=True)
    )
    found = [side.detach() for side in log_likelihoods(model, pairs)]
    torch.testing.assert_close(found[0], torch.tensor(safe, dtype=torch.float64))
    torch.testing.assert_close(found[1], torch.tensor(harm, dtype=torch.float64))
    contrast = -logsigmoid(found[0] - found[1]).mean()
    assert float(contrastive_loss(*found, pairs)) == pytest.approx(float(contrast))
    difference = -sum(safe) / sum(safe_tokens) + sum(harm) / sum(harm_tokens)
    assert float(difference_loss(*found, pairs)) == pytest.approx(difference)
    for loss in (contrastive_loss, difference_loss):  # what each process has of a batch adds up
        parts = [loss(found[0][part], found[1][part], pairs) for part in (slice(0, 2), slice(2, 3))]
        assert float(sum(parts)) == pytest.approx(float(loss(*found, pairs)))
