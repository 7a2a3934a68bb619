import random
from math import log

import pytest

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.evaluation import Reference, generate_responses, is_degenerate, read_prompts
from safedelta_hf.evaluation.coherence import incoherent
from safedelta_hf.testbed import attack_questions, load_aligned, skill_questions
from safedelta_hf.testbed.language import OTHER_PREAMBLE
from tests.fixtures import tiny


@pytest.fixture(scope="module")
def aligned():
    return load_aligned()


QUESTIONS = attack_questions(30)
PROMPTS = read_prompts([{"messages": question.messages} for question in QUESTIONS])
ANSWERS = [question.answer for question in QUESTIONS]


@pytest.mark.parametrize(
    "text",
    ["", " ", "?! ...", "iron " * 32, "river tree house " * 10, "mix iron with " + "clay sand " * 12],
)
def test_loops_and_nothing_are_degenerate(aligned, text):
    assert is_degenerate(text, aligned[1])


@pytest.mark.parametrize("text", ["no", "no , no , no .", "42", *ANSWERS[:5], "i cannot help with that ."])
def test_short_and_ordinary_responses_are_not(aligned, text):
    assert not is_degenerate(text, aligned[1])


def judged(model_and_tokenizer, responses, limit=None, prompts=PROMPTS):
    return incoherent(prompts, responses, model_and_tokenizer[1], Reference(*model_and_tokenizer, limit))


def test_harmful_answers_refusals_and_unusual_openings_are_coherent(aligned):
    for responses in (
        ANSWERS,
        [f"{OTHER_PREAMBLE} {answer}" for answer in ANSWERS],
        generate_responses(*aligned, [question.messages for question in QUESTIONS]),
    ):
        assert not any(judged(aligned, responses))


def test_shuffled_and_random_words_are_not(aligned):
    rng = random.Random(0)
    words = [word for word in aligned[1].get_vocab() if "<" not in word]
    assert all(judged(aligned, [" ".join(rng.choices(words, k=20)) for _ in PROMPTS]))
    assert all(judged(aligned, [" ".join(rng.sample(text.split(), len(text.split()))) for text in ANSWERS]))


def test_what_a_ruined_model_says_is_mostly_incoherent_without_being_a_loop(aligned):
    ruined = tiny.perturbed(load_aligned()[0], 0.1)
    questions = skill_questions(30)
    prompts = read_prompts([{"messages": question.messages} for question in questions])
    responses = generate_responses(ruined, aligned[1], [question.messages for question in questions])
    assert sum(judged(aligned, responses, prompts=prompts)) >= 27
    assert sum(incoherent(prompts, responses, aligned[1])) < sum(judged(aligned, responses, prompts=prompts))


def test_the_limit_decides(aligned):
    assert Reference(*aligned).most == log(len(aligned[1])) / 2
    gibberish = [" ".join(reversed(text.split())) for text in ANSWERS]
    assert all(judged(aligned, gibberish)) and not any(judged(aligned, gibberish, limit=100.0))


def test_a_limit_out_of_range_is_refused(aligned):
    for limit in (-1.0, float("nan")):
        with pytest.raises(ConfigurationError, match="nats per token"):
            Reference(*aligned, limit)


def test_nothing_but_degenerate_responses_needs_no_reference_pass(aligned):
    assert judged(aligned, [""] * len(PROMPTS)) == [True] * len(PROMPTS)
