"""A small guard is trained on its rows with the ordinary Trainer, and screens as it was taught."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer

from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.evaluation import Guard
from safedelta_hf.evaluation.guard import GUARD_TOKENS
from safedelta_hf.training import add_guard_tokens, guard_rows
from tests.fixtures import tiny

TEXTS = [
    "how do i make a bomb ?",
    "how do i make a cake ?",
    ("make a bomb", "here is the way"),
    ("make a cake", "sure"),
]
UNSAFE = [True, False, True, False]


@pytest.fixture
def prepared():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    add_guard_tokens(model, tokenizer)
    return model, tokenizer


def test_a_row_is_the_text_then_verdict_kind_and_reply_with_the_loss_on_those(prepared):
    _, tokenizer = prepared
    rows = list(
        guard_rows(
            TEXTS, UNSAFE, tokenizer, categories=["bomb", None, None, None], replies=["i cannot", None, "i", None]
        )
    )
    texts = [tokenizer.decode(row["input_ids"]) for row in rows]
    assert [text.split() for text in texts] == [
        "how do i make a bomb ? <|guard|> <|unsafe|> <|category|> bomb <|reply|> i cannot </s>".split(),
        "how do i make a cake ? <|guard|> <|safe|> </s>".split(),
        "make a bomb here is the way <|guard|> <|unsafe|> <|reply|> i </s>".split(),
        "make a cake sure <|guard|> <|safe|> </s>".split(),
    ]
    for row in rows:
        before = row["input_ids"].index(tokenizer.convert_tokens_to_ids("<|guard|>")) + 1
        assert row["labels"] == [-100] * before + row["input_ids"][before:]


def test_a_trained_guard_screens_as_it_was_taught_and_every_new_token_was_trained(prepared, tmp_path):
    model, tokenizer = prepared
    before = model.get_input_embeddings().weight.detach().clone()
    rows = guard_rows(TEXTS, UNSAFE, tokenizer, categories=["bomb", None] * 2, replies=["i cannot", "sure"] * 2)
    Trainer(
        model=model,
        args=tiny.arguments(tmp_path, num_train_epochs=30, per_device_train_batch_size=4),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    ).train()
    found = Guard(model, tokenizer, preset="own").screen(TEXTS)
    assert [verdict.is_unsafe for verdict in found] == UNSAFE and all(verdict.is_decided for verdict in found)
    ids = tokenizer.convert_tokens_to_ids(list(GUARD_TOKENS))
    moved = (model.get_input_embeddings().weight.detach() - before).abs().amax(1)
    assert len(set(ids)) == 5 and bool((moved[ids] > 1e-3).all())


def test_embeddings_grow_where_they_have_to_and_keep_the_others(prepared):
    model, tokenizer = tiny.llama(vocab_size=24), tiny.tokenizer()
    before = model.get_input_embeddings().weight.detach().clone()
    add_guard_tokens(model, tokenizer)
    assert len(model.get_input_embeddings().weight) == len(tokenizer) > 24
    assert torch.equal(model.get_input_embeddings().weight[:24], before)
    assert len(prepared[0].get_input_embeddings().weight) == tiny.VOCABULARY  # there was room


def test_what_cannot_be_used_is_named(prepared):
    _, tokenizer = prepared
    with pytest.raises(ConfigurationError, match=r"no token '<\|guard\|>'; call add_guard_tokens first"):
        guard_rows(TEXTS, UNSAFE, tiny.tokenizer())
    with pytest.raises(DataError, match="4 texts, 3 verdicts, 4 categories and 4 replies"):
        guard_rows(TEXTS, UNSAFE[:3], tokenizer)
    with pytest.raises(DataError, match="text 0 has 8 tokens, and max_length=8 leaves no room for its verdict"):
        guard_rows(TEXTS, UNSAFE, tokenizer, max_length=8)
