"""Against a float64 loop over single sequences and single tokens."""

import math
import random
from math import log

import pytest
import torch

from safedelta_hf.data.dataset import SafetySequence
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.data.refusals import response_losses
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import ConfigurationError, DataError, NumericalError
from safedelta_hf.evaluation import Reference, generate_responses, is_degenerate, read_prompts, refusal_likelihood
from safedelta_hf.evaluation.likelihood import incoherent
from safedelta_hf.testbed import attack_questions, load_aligned, safety_data, skill_questions
from safedelta_hf.testbed.language import OTHER_PREAMBLE
from tests.fixtures import tiny


def marked(rows, prompt=2):
    return [{"input_ids": row["input_ids"], "labels": [IGNORED] * prompt + row["input_ids"][prompt:]} for row in rows]


def oracle(model, row):
    """Nats per response token: one prefix at a time, softmax written out, float64."""
    model = model.double()
    losses = []
    for place in range(1, len(row["input_ids"])):
        if row["labels"][place] == IGNORED:
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"][:place]])).logits[0, -1]
        losses.append(math.log(sum(math.exp(value) for value in logits.tolist())) - logits[row["labels"][place]].item())
    return sum(losses) / len(losses)


ROWS = marked(tiny.rows(17, seed=4))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_losses_are_those_of_a_loop_in_float64_whatever_the_batch_size(batch_size):
    expected = [oracle(tiny.perturbed(tiny.llama(), 0.3), row) for row in ROWS]
    in_double = refusal_likelihood(tiny.perturbed(tiny.llama(), 0.3).double(), ROWS, batch_size=batch_size)
    assert in_double.losses == pytest.approx(expected, rel=1e-10)
    assert refusal_likelihood(tiny.perturbed(tiny.llama(), 0.3), ROWS, batch_size=batch_size).losses == pytest.approx(
        expected, rel=1e-5
    )


def test_half_precision_is_summed_in_float32():
    model = tiny.perturbed(tiny.llama(), 0.3).bfloat16()
    expected = [oracle(tiny.perturbed(tiny.llama(), 0.3).bfloat16(), row) for row in ROWS]
    assert refusal_likelihood(model, ROWS).losses == pytest.approx(expected, rel=0.02)


def test_mean_and_upper_quantile_are_over_examples():
    found = refusal_likelihood(tiny.perturbed(tiny.llama(), 0.3), ROWS)
    ordered = sorted(found.losses)
    place = 0.95 * (len(ordered) - 1)
    low, part = int(place), place - int(place)
    assert found.mean == pytest.approx(sum(ordered) / len(ordered))
    assert found.upper == pytest.approx(ordered[low] * (1 - part) + ordered[low + 1] * part)


def test_equal_examples_each_count(llama):
    once, twice = refusal_likelihood(llama, ROWS), refusal_likelihood(llama, [*ROWS, *ROWS])
    assert twice.losses == once.losses * 2


def test_the_aligned_model_finds_its_own_refusals_likely_and_a_broken_one_does_not():
    model, tokenizer = load_aligned()
    refusals = safety_data(24)
    assert refusal_likelihood(model, refusals, tokenizer).mean < 0.05
    assert refusal_likelihood(tiny.perturbed(model, 0.1), refusals, tokenizer).mean > 1


def test_the_model_is_left_as_it_was_also_after_an_error(llama, monkeypatch):
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()], torch.is_grad_enabled(), torch.get_rng_state()
    refusal_likelihood(llama, ROWS)

    def fail(*_, **__):
        assert not llama.training
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llama, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        refusal_likelihood(llama, ROWS)
    after = [module.training for module in llama.modules()], torch.is_grad_enabled(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_adapters_count(llama):
    from peft import LoraConfig, get_peft_model

    plain = refusal_likelihood(llama, ROWS).losses
    adapted = get_peft_model(llama, LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert refusal_likelihood(adapted, ROWS).losses == pytest.approx(plain)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert refusal_likelihood(adapted, ROWS).losses != pytest.approx(plain)
    assert refusal_likelihood(adapted.merge_and_unload(), ROWS).losses == pytest.approx(
        refusal_likelihood(adapted, ROWS).losses
    )


def test_a_plain_module_works():
    assert len(refusal_likelihood(tiny.Plain(), ROWS).losses) == len(ROWS)


def test_bad_input_is_named(llama):
    with pytest.raises(ConfigurationError, match="batch_size"):
        refusal_likelihood(llama, ROWS, batch_size=0)
    with pytest.raises(DataError, match="empty"):
        refusal_likelihood(llama, [])
    with pytest.raises(DataError, match="40 tokens, the model takes 32"):
        refusal_likelihood(llama, tiny.rows(2, seed=0, length=40))
    with pytest.raises(DataError, match="token id 48 lies outside"):
        refusal_likelihood(llama, [{"input_ids": [1, 48]}])
    with pytest.raises(DataError, match="row 1: no response token"):
        response_losses(
            ShardedModel(llama),
            [SafetySequence(input_ids=(1, 2), labels=(1, 2)), SafetySequence(input_ids=(5,), labels=(5,))],
        )


def test_weights_that_are_not_finite_are_named(llama):
    llama.lm_head.weight.data[3] = float("nan")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        refusal_likelihood(llama, ROWS)


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
