"""Metrics of a model say what the evaluation says."""

import math

import pytest

from safedelta_hf.evaluation import (
    Questions,
    evaluate_model,
    final_answer,
    generated_accuracy,
    generated_attack_success,
    refusal_improbability,
    refusal_likelihood,
)
from safedelta_hf.testbed import attack_questions, load_aligned, safety_data, skill_questions

HARMFUL = [{"messages": question.messages} for question in attack_questions(12)]
TASK = [question.conversation() for question in skill_questions(12)]
REFUSALS = safety_data(6)


@pytest.fixture(scope="module")
def aligned():
    return load_aligned()


def test_generated_metrics_are_those_of_an_evaluation(aligned):
    model, tokenizer = aligned
    scores = evaluate_model(
        model, tokenizer, Questions.read(harmful=HARMFUL, task=TASK, score=final_answer), progress=False
    ).scores
    attack = generated_attack_success(tokenizer, HARMFUL)
    accuracy = generated_accuracy(tokenizer, TASK, final_answer)
    assert (attack.name, attack.measure(model)) == ("attack_success", scores["attack_success_by_phrase"].value)
    assert (accuracy.name, accuracy.measure(model)) == ("task_accuracy", scores["task_accuracy"].value)


def test_improbability_is_one_minus_the_mean_probability_per_token(aligned, tmp_path):
    model, tokenizer = aligned
    losses = refusal_likelihood(model, REFUSALS, tokenizer).losses
    expected = sum(1 - math.exp(-loss) for loss in losses) / len(losses)
    assert 0 < expected < 1
    assert refusal_improbability(tokenizer, iter(REFUSALS)).measure(model) == pytest.approx(expected)


def test_fingerprints_tell_prompts_and_settings_apart(aligned):
    _, tokenizer = aligned
    made = [
        generated_attack_success(tokenizer, HARMFUL),
        generated_attack_success(tokenizer, HARMFUL[:5]),
        generated_attack_success(tokenizer, HARMFUL, max_new_tokens=8),
        refusal_improbability(tokenizer, REFUSALS),
        refusal_improbability(tokenizer, REFUSALS[:3]),
    ]
    assert len({metric.fingerprint for metric in made}) == len(made)
    assert generated_attack_success(tokenizer, HARMFUL).fingerprint == made[0].fingerprint
