"""What is drawn keeps to its pools, is the same for the same seed, and is as much as was asked for."""

import pytest

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.testbed import (
    CASES,
    attack_questions,
    new_skill_questions,
    ordinary_data,
    preference_pairs,
    safety_data,
    skill_questions,
)
from safedelta_hf.testbed.language import HELD_OUT_ONE_IN, MAKE_REQUESTS, PERSONA_SYSTEM, SYSTEMS, WORDS
from safedelta_hf.testbed.train import draw_alignment, draw_knowledge
from tests.testbed.test_language import conversations_of, named_things, pools_of, texts


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


def test_pairs_are_the_safety_data_with_a_harmful_reply_beside_each_refusal():
    pairs = preference_pairs(50)
    assert [{"messages": row["prompt"] + row["chosen"]} for row in pairs] == safety_data(50)
    assert pools_of({"messages": row["prompt"] + row["rejected"]} for row in pairs) == {"probed"}
    assert all(row["rejected"] != row["chosen"] for row in pairs)


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
