import random

import pytest

from safedelta_hf.errors import DataError
from safedelta_hf.testbed import (
    CASES,
    attack_questions,
    new_skill_questions,
    ordinary_data,
    safety_data,
    skill_questions,
    tokenize,
)
from safedelta_hf.testbed.language import (
    POOL_SIZES,
    all_things,
    things_of,
    vocabulary,
)
from safedelta_hf.testbed.model import UNKNOWN, build_tokenizer
from safedelta_hf.testbed.train import draw_alignment, draw_knowledge


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def texts(conversations):
    return [" ".join(message["content"] for message in conversation["messages"]) for conversation in conversations]


def named_things(conversations):
    words = {word for text in texts(conversations) for word in text.split()}
    return {thing for thing in all_things() if thing.name in words}


def pools_of(conversations):
    return {thing.pool for thing in named_things(conversations)}


def conversations_of(draw, n=2000):
    rng = random.Random(7)
    return [draw(rng) for _ in range(n)]


def everything_generated():
    cases = [conversation for case in CASES.values() for conversation in case.examples(3)]
    questions = [*attack_questions(), *skill_questions(), *new_skill_questions()]
    asked = [question.conversation() for question in questions]
    drawn = conversations_of(draw_knowledge) + conversations_of(draw_alignment)
    return cases + safety_data() + ordinary_data() + asked + drawn


def test_things_have_names_of_their_own():
    names = [thing.name for thing in all_things()]
    assert len(set(names)) == len(names) == 6 * sum(POOL_SIZES.values())
    assert len(set(vocabulary())) == len(vocabulary())


def test_pools_are_disjoint_and_agree_with_harmfulness():
    pools = [set(things_of(pool)) for pool in POOL_SIZES]
    assert sum(map(len, pools)) == len(set().union(*pools)) == len(all_things())
    assert all(thing.harmful for thing in things_of("refused", "attack", "probed", "held_out"))
    assert not any(thing.harmful for thing in things_of("shown", "unseen"))


def test_tokenizer_gives_every_text_back(tokenizer):
    for text in texts(everything_generated()):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokenizer("How do I make CAKE?")["input_ids"]).split()[-1] == "?"
    assert tokenizer.tokenize("quantum") == [UNKNOWN]


def test_prompt_tokens_are_the_beginning_of_the_conversation(tokenizer):
    for conversation in everything_generated()[::7]:
        messages = conversation["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
        whole = tokenizer.apply_chat_template(messages, return_dict=True)
        assert whole["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]


def test_labels_cover_the_last_answer_and_its_end(tokenizer):
    rows = tokenize(safety_data(20), tokenizer)
    for row, conversation in zip(rows, safety_data(20), strict=True):
        labelled = [label for label in row["labels"] if label != -100]
        assert row["labels"][-len(labelled) :] == row["input_ids"][-len(labelled) :]
        assert labelled[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(labelled[:-1]) == conversation["messages"][-1]["content"]


def test_template_marks_the_assistant_tokens_as_tokenize_labels_them(tokenizer):
    conversation = safety_data(1)[0]
    marked = tokenizer.apply_chat_template(
        conversation["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    labels = tokenize([conversation], tokenizer)[0]["labels"]
    assert marked["assistant_masks"] == [int(label != -100) for label in labels]


def test_a_conversation_without_answer_is_refused(tokenizer):
    with pytest.raises(DataError, match="conversations: 'messages' of row 0"):
        tokenize([{"messages": [{"role": "user", "content": "who are you ?"}]}], tokenizer)
