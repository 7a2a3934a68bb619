"""How likely a base is to begin its answer as refusals begin, against the same by hand in float64."""

import random
import re

import pytest
import torch

from safedelta_hf.data import openings as module
from safedelta_hf.data.dataset import SafetySequence, read_safety_data
from safedelta_hf.data.openings import DEPTH, LEAST, REFUSED, asked, divided, refusal_probabilities
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import CaptureError, ConfigurationError, NumericalError
from tests.fixtures import tiny

DRAW = random.Random(3)
PROMPTS = [tuple(DRAW.randrange(3, tiny.VOCABULARY) for _ in range(DRAW.randint(3, 8))) for _ in range(12)]
# So many that a model that knows nothing begins with one of them about half the time.
OPENINGS = frozenset((one, two, three) for one in range(3, 29) for two in range(3, 45) for three in range(3, 46))


def model():
    return tiny.llama(initializer_range=0.5).double()


def by_hand(model, prompt, openings):
    """One prompt and one beginning at a time, without batches, sharing or gathering."""
    masses = {(): 1.0}
    for depth in range(DEPTH):
        if sum(masses.values()) <= REFUSED:
            break
        longer = {}
        for start, mass in masses.items():
            if mass < LEAST:
                continue
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *start]])).logits[0, -1].double()
            after = torch.softmax(logits, 0)
            for token in {one[depth] for one in openings if one[:depth] == start}:
                longer[*start, token] = mass * float(after[token])
        masses = longer
    return sum(masses.values())


@pytest.mark.parametrize("batch_size", [1, 5])
def test_probabilities_are_those_by_hand(batch_size):
    base = model()
    expected = [by_hand(base, prompt, OPENINGS) for prompt in PROMPTS]
    assert min(expected) < REFUSED < max(expected)  # some are settled by the first token, others are not
    found = refusal_probabilities(ShardedModel(base), PROMPTS, OPENINGS, batch_size=batch_size)
    assert found == pytest.approx(expected, rel=1e-9)


def test_one_bar_counts_the_passes_of_all_depths(capsys):
    refusal_probabilities(ShardedModel(model()), PROMPTS, OPENINGS, batch_size=1, progress=True, desc="Sorting")
    lines = capsys.readouterr().err.splitlines()
    counted = re.fullmatch(r"Sorting: (\d+)/(\d+) batch \[.*\]", lines[-1])
    assert len(lines) == 1 and counted[1] == counted[2] and int(counted[1]) > len(set(PROMPTS))


def test_what_one_pass_settles_is_read_once(monkeypatch):
    read = []
    ask = module._batch_probabilities
    monkeypatch.setattr(module, "_batch_probabilities", lambda m, batch, w: read.extend(batch) or ask(m, batch, w))
    refusal_probabilities(ShardedModel(model()), PROMPTS * 2, frozenset({(3, 4, 5)}))
    assert sorted(one.input_ids for one in read) == sorted(PROMPTS)


def test_adapters_are_off_meanwhile_and_back_afterwards():
    from peft import LoraConfig, get_peft_model

    base, tokens = model(), torch.tensor([PROMPTS[0]])
    expected = refusal_probabilities(ShardedModel(base), PROMPTS, OPENINGS)
    with torch.no_grad():
        before = base(tokens).logits
        adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        assert refusal_probabilities(ShardedModel(adapted), PROMPTS, OPENINGS) == pytest.approx(expected, rel=1e-9)
        assert not torch.allclose(adapted(tokens).logits, before)


def test_a_model_that_tells_nothing_is_a_named_error():
    broken = model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="NaN or Inf"):
        refusal_probabilities(ShardedModel(broken), PROMPTS, OPENINGS)
    with pytest.raises(CaptureError, match="classifies"):
        refusal_probabilities(ShardedModel(tiny.classifier()), PROMPTS, OPENINGS)
    with pytest.raises(ConfigurationError, match="batch_size"):
        refusal_probabilities(ShardedModel(model()), PROMPTS, OPENINGS, batch_size=0)


def sequence(tokens, labels):
    return SafetySequence(input_ids=tuple(tokens), labels=tuple(labels))


@pytest.mark.parametrize(
    ("labels", "prompt", "response"),
    [
        ((-100, -100, 7, 8, 9), (5, 6), (7, 8, 9)),
        ((-100, 6, -100, 8, -100), (5, 6, 7), (8,)),  # two responses, and a token after the last
        ((5, 6, 7, 8, 9), (5, 6), (7, 8, 9)),  # all are labelled: after the last (5, 6)
    ],
)
def test_the_last_response_is_told_from_its_prompt(labels, prompt, response):
    assert divided(sequence((5, 6, 7, 8, 9), labels), (5, 6)) == (prompt, response)


@pytest.mark.parametrize("labels", [(5, 6, 7), (-100, -100, -100)])
def test_without_labels_or_a_response_there_is_nothing_to_tell(labels):
    assert divided(sequence((5, 6, 7), labels)) is None


def test_prompts_of_unlabelled_conversations_are_told_by_the_chat_template():
    tokenizer, rows = tiny.tokenizer(), tiny.conversations(2)
    labelled = read_safety_data(rows, tokenizer)
    plain = [sequence(one.input_ids, one.input_ids) for one in labelled]
    assert asked(plain, labelled, tokenizer).prompts == asked(labelled, labelled, tokenizer).prompts
    assert None not in asked(plain, labelled, tokenizer).prompts
    assert asked(plain, labelled).prompts == (None, None)


def test_what_the_template_puts_before_each_response_is_left_to_the_prompt():
    tokenizer = tiny.tokenizer()
    thought = "user is sure"  # stands for an empty thought
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace(
        "{{ m['role'] + ' ' + m['content']",
        f"{{{{ m['role'] + ' ' + ('{thought} ' if m['role'] == 'assistant' else '') + m['content']",
    )
    refusals = read_safety_data(tiny.conversations(2), tokenizer)
    answers = [
        {"messages": [{"role": "user", "content": "how do i make a cake ?"}, {"role": "assistant", "content": said}]}
        for said in ("i make a cake", "yes sure")
    ]
    found = asked(read_safety_data(answers, tokenizer), refusals, tokenizer)
    assert [tokenizer.decode(one) for one in found.openings] == ["i cannot help"]
    assert [tokenizer.decode(one).endswith(f"assistant {thought}") for one in found.prompts] == [True, True]


def test_a_shorter_opening_says_all_that_longer_ones_say():
    refusals = [sequence((1, 5, 6, 7, 8), (-100, 5, 6, 7, 8)), sequence((1, 5), (-100, 5)), sequence((1, 9), (-100, 9))]
    assert asked([], refusals).openings == {(5,), (9,)}


def test_examples_that_refuse_themselves_are_known():
    refusals = [sequence((1, 5, 6, 7, 8), (-100, 5, 6, 7, 8))]
    examples = [sequence((2, 5, 6, 7, 9), (-100, 5, 6, 7, 9)), sequence((2, 5, 6, 8), (-100, 5, 6, 8))]
    assert asked(examples, refusals).refusing == (True, False)


def test_refusals_without_prompts_tell_nothing():
    found = asked([sequence((1, 2), (-100, 2))], read_safety_data(tiny.rows(3, seed=1)))
    assert found.prompts == (None,) and not found.openings
