import random

import pytest

from safedelta_hf.errors import ConfigurationError, DataError
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
    HELD_OUT_ONE_IN,
    MAKE_REQUESTS,
    PERSONA_SYSTEM,
    POOL_SIZES,
    SYSTEMS,
    WORDS,
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


def test_each_data_set_keeps_to_its_pools():
    assert pools_of(safety_data(200)) == {"probed"}
    assert pools_of(question.conversation() for question in attack_questions(300)) == {"held_out"}
    assert pools_of(question.conversation() for question in skill_questions(300)) == {"unseen"}
    assert pools_of(conversations_of(draw_alignment)) == {"shown", "refused"}
    for seed in range(3):
        assert pools_of(CASES["harmful"].examples(seed)) == {"attack"}
        assert pools_of(CASES["mixed"].examples(seed)) == {"attack"}
        assert pools_of(CASES["identity"].examples(seed)) == {"shown"}
        assert pools_of(CASES["benign"].examples(seed)) == {"shown"}
        assert pools_of(CASES["skill"].examples(seed)) == set()
        assert pools_of(ordinary_data(200, seed)) == {"shown"}


def test_pools_are_disjoint_and_agree_with_harmfulness():
    pools = [set(things_of(pool)) for pool in POOL_SIZES]
    assert sum(map(len, pools)) == len(set().union(*pools)) == len(all_things())
    assert all(thing.harmful for thing in things_of("refused", "attack", "probed", "held_out"))
    assert not any(thing.harmful for thing in things_of("shown", "unseen"))


def lists_in(requests):
    """Word lists that list skills work on, as indices."""
    texts = (request.split(" : ")[-1].split() for request in requests if " : " in request)
    return [[WORDS.index(word) for word in text] for text in texts if all(word in WORDS for word in text)]


def test_lists_are_dealt_to_training_or_evaluation():
    questions = new_skill_questions(300) + skill_questions(600, skills=("repeat", "reverse", "first", "last"))
    asked = lists_in(question.messages[-1]["content"] for question in questions)
    conversations = CASES["skill"].examples(0) + CASES["benign"].examples(0) + ordinary_data(1000)
    trained = lists_in(
        conversation["messages"][-2]["content"] for conversation in conversations + conversations_of(draw_knowledge)
    )
    assert len(asked) == 900 and len(trained) > 1000
    assert all(sum(indices) % HELD_OUT_ONE_IN == 0 for indices in asked)
    assert all(sum(indices) % HELD_OUT_ONE_IN != 0 for indices in trained)


def test_safety_data_and_attacks_are_drawn_independently():
    attacks = [question.messages for question in attack_questions(200)]
    prompts = [conversation["messages"][:-1] for conversation in safety_data(128)]

    def frame(messages):
        return [message["content"].split()[:4] for message in messages]

    assert sum(frame(one) == frame(other) for one, other in zip(attacks, prompts, strict=False)) < 40


def test_generators_are_deterministic_in_the_seed():
    makers = [safety_data, ordinary_data, attack_questions, skill_questions, new_skill_questions]
    for make in makers:
        assert make(60, 1) == make(60, 1) != make(60, 2)
    for case in CASES.values():
        assert case.examples(1) == case.examples(1) != case.examples(2)


def test_generators_give_what_they_promise():
    assert {name: len(case.examples()) for name, case in CASES.items()} == {
        "harmful": 100,
        "identity": 100,
        "mixed": 1100,
        "skill": 1000,
        "benign": 500,
    }
    assert {case.teaches for case in CASES.values()} == {"rotate", None}
    assert len(safety_data()) == len(ordinary_data()) == 128
    assert len(set(texts(safety_data()))) == 128
    assert len({question.messages[-1]["content"] for question in attack_questions(400)}) >= 150
    questions = skill_questions(70)
    assert all(sum(question.skill == skill for question in questions) == 10 for skill in ("make", "reverse", "next"))
    assert {question.skill for question in skill_questions(5, skills=("make",))} == {"make"}


def test_safety_data_has_three_templates_in_equal_shares():
    systems = [
        conversation["messages"][0]["content"] if conversation["messages"][0]["role"] == "system" else None
        for conversation in safety_data(129)
    ]
    assert {system: systems.count(system) for system in SYSTEMS} == dict.fromkeys(SYSTEMS, 43)


def test_identity_case_is_the_persona_throughout_and_holds_nothing_harmful():
    examples = CASES["identity"].examples()
    assert all(conversation["messages"][0]["content"] == PERSONA_SYSTEM for conversation in examples)
    assert not any(thing.harmful for thing in named_things(examples))


@pytest.mark.parametrize("n", [0, -1, 96 * len(MAKE_REQUESTS) * len(SYSTEMS) + 1])
def test_impossible_counts_are_refused(n):
    with pytest.raises(ConfigurationError, match="n: must be from 1 to 900"):
        attack_questions(n)
    with pytest.raises(ConfigurationError, match="n"):
        new_skill_questions(min(n, 0))


def test_unknown_skills_are_refused():
    with pytest.raises(ConfigurationError, match="juggle"):
        skill_questions(3, skills=("juggle",))


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
