"""Steering moves the chosen layers at the chosen tokens by the formula, and nothing else."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.evaluation import Scans, generate_responses
from safedelta_hf.evaluation.generation import prompt_tokens
from safedelta_hf.evaluation.hidden_states import last_states
from safedelta_hf.evaluation.scans import equal_error_threshold
from safedelta_hf.testbed import attack_questions, load_aligned, safety_data, skill_questions
from tests.fixtures import architectures, templates, tiny

LAYERS = 8
FIRST, LAST = 2, 4
ROWS = [row["input_ids"] for row in tiny.rows(5, seed=11)]


def model_of(**changes):
    return tiny.perturbed(tiny.llama(num_hidden_layers=LAYERS, **changes), 0.3)


def scans_of(model, *, threshold=0.0, multiplier=0.7):
    """Random directions and transitions, so that rows fall on both sides of the threshold."""
    draw = torch.Generator().manual_seed(3)
    hidden = model.config.hidden_size
    return Scans(
        directions=nn.functional.normalize(torch.randn(LAST - FIRST + 1, hidden, generator=draw), dim=-1),
        transitions=torch.randn(model.config.num_hidden_layers - FIRST, hidden, generator=draw),
        first=FIRST,
        count=model.config.num_hidden_layers,
        multiplier=multiplier,
        threshold=threshold,
        affirmation=(9,),
    )


def scores(scans, model):
    """The formula, prompt by prompt, from hidden states of separate passes."""
    found = []
    for row in ROWS:
        end, sure = (last_states(model, [tokens])[0, 0, FIRST:] for tokens in (row, [*row, 9]))
        cosines = nn.functional.cosine_similarity(sure - end, scans.transitions, dim=-1)
        found.append(float(cosines.mean()))
    return found


def split_evenly(model):
    """A threshold with prompts on both sides."""
    ordered = sorted(scores(scans_of(model), model))
    return (ordered[1] + ordered[2]) / 2


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, rows, **settings):
    batch = padded(rows)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | settings
    return model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def outputs_of(model, scans, rows):
    """Output of every layer in one pass, as steered, with what it was given."""
    seen = {}

    def look(number):
        def hook(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            if len(given) == len(rows):  # the passes that tell the queries apart have other batches
                seen[number] = (given, output)

        return hook

    layers = model.model.layers
    with torch.no_grad(), scans.steer(model):
        handles = [layer.register_forward_hook(look(n), with_kwargs=True) for n, layer in enumerate(layers)]
        model(**padded(rows), use_cache=False)
        for handle in handles:
            handle.remove()
    return seen


def test_each_row_takes_the_step_of_its_own_score_at_the_last_token_of_the_chosen_layers_alone():
    model = model_of().double()
    scans = scans_of(model, threshold=split_evenly(model))
    signs = [1 if score >= scans.threshold else -1 for score in scores(scans, model)]
    assert set(signs) == {1, -1}
    steered = outputs_of(model, scans, ROWS)
    plain = outputs_of(model, Scans(**{**vars(scans), "multiplier": 0.0}), ROWS)
    for number in range(LAYERS):
        given, found = steered[number]
        assert torch.equal(plain[number][1][:, :-1], found[:, :-1])  # tokens before the last are as ever
        if number < FIRST:
            assert torch.equal(plain[number][1], found)
        if number == FIRST:
            assert torch.equal(plain[number][0], given)
            step = found[:, -1] - plain[number][1][:, -1]
            expected = torch.stack([sign * 0.7 * scans.directions[0].double() for sign in signs])
            torch.testing.assert_close(step, expected)
        if FIRST < number <= LAST:
            assert not torch.equal(plain[number][1][:, -1], found[:, -1])


def test_the_sign_flips_with_the_label():
    model = model_of()
    towards, away = (outputs_of(model, scans_of(model, threshold=limit), ROWS) for limit in (-2.0, 2.0))
    plain = outputs_of(model, scans_of(model, multiplier=0.0), ROWS)
    one, other = (found[FIRST][1] - plain[FIRST][1] for found in (towards, away))
    torch.testing.assert_close(one, -other)
    assert one.abs().max() > 0.1


def test_a_multiplier_of_zero_changes_no_bit():
    model = model_of()
    with torch.no_grad():
        expected = model(**padded(ROWS)).logits
        with scans_of(model, multiplier=0.0).steer(model):
            assert torch.equal(model(**padded(ROWS)).logits, expected)


@pytest.mark.parametrize("key", ["llama", "gpt2", "mixtral", "gemma2", "opt", "bloom", "mamba"])
def test_tokens_are_the_same_with_a_cache_and_without_and_batched_and_single(key):
    model = model_of() if key == "llama" else tiny.perturbed(architectures.tiny_model(key), 0.2)
    first = 0 if key != "llama" else FIRST
    scans, width = scans_of(model), model.config.get_text_config().hidden_size
    transitions = torch.randn(model.config.num_hidden_layers - first, width, generator=torch.Generator().manual_seed(1))
    scans = Scans(**{**vars(scans), "first": first, "transitions": transitions, "directions": scans.directions[:1] * 3})
    with scans.steer(model):
        whole = generated(model, ROWS)
        assert torch.equal(generated(model, ROWS, use_cache=False), whole)
        for row, expected in zip(ROWS, whole, strict=True):
            assert torch.equal(generated(model, [row])[0], expected)
    with torch.no_grad():
        assert not torch.equal(outputs_logits(model, scans), model(**padded(ROWS)).logits)


def test_beams_of_one_prompt_take_its_step():
    model = model_of()
    scans = scans_of(model, threshold=split_evenly(model))
    with scans.steer(model):
        whole = generated(model, ROWS, num_beams=3)
        for row, expected in zip(ROWS, whole, strict=True):
            assert torch.equal(generated(model, [row], num_beams=3)[0], expected)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_model(fails):
    model = model_of()
    before, weights = hooks(model), tiny.weights(model)
    expected = generated(model, ROWS)
    try:
        with scans_of(model).steer(model):
            assert hooks(model) == before + 4 + LAST - FIRST + 1
            generated(model, ROWS)
            if fails:
                raise RuntimeError("planted")
    except RuntimeError:
        assert fails
    assert hooks(model) == before and tiny.same(tiny.weights(model), weights)
    assert torch.equal(generated(model, ROWS), expected)


def test_queries_are_told_apart_once_for_each_prompt(monkeypatch):
    model, told = model_of(), []
    scans = scans_of(model)
    original = Scans._scores
    monkeypatch.setattr(Scans, "_scores", lambda self, *given: told.append(given[1]) or original(self, *given))
    with scans.steer(model):
        for use_cache in (True, False):
            generated(model, ROWS, use_cache=use_cache)
    assert told == [ROWS, ROWS]  # without the padding


def test_a_conversation_that_grows_is_told_apart_again(monkeypatch):
    model, told = model_of(), []
    original = Scans._scores
    monkeypatch.setattr(Scans, "_scores", lambda self, *given: told.append(given[1]) or original(self, *given))
    with scans_of(model).steer(model):
        for row in (ROWS[0], ROWS[0] + ROWS[1]):
            generated(model, [row], use_cache=False, max_new_tokens=2)
    assert told == [[ROWS[0]], [ROWS[0] + ROWS[1]]]


@pytest.mark.parametrize("direct", [False, True])
def test_adapters_are_steered_too(direct):
    bare = model_of()
    scans = scans_of(bare)
    adapted = get_peft_model(copy.deepcopy(bare), LoraConfig(target_modules=["q_proj"]))
    with scans.steer(bare), scans.steer(adapted), torch.no_grad():
        if direct:
            assert torch.equal(bare(**padded(ROWS)).logits, adapted(**padded(ROWS)).logits)
        else:
            assert torch.equal(generated(bare, ROWS), generated(adapted, ROWS))
    with torch.no_grad():
        assert not torch.equal(bare(**padded(ROWS)).logits, outputs_logits(bare, scans))


def outputs_logits(model, scans):
    with scans.steer(model):
        return model(**padded(ROWS)).logits


def test_padding_on_the_right_and_embeddings_are_refused():
    model = model_of()
    with scans_of(model).steer(model):
        with pytest.raises(ConfigurationError, match="padding_side"):
            model(input_ids=torch.tensor([[5, 6, 0]]), attention_mask=torch.tensor([[1, 1, 0]]))
        with pytest.raises(ConfigurationError, match="inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 2, 16))


def test_an_error_in_the_model_leaves_the_next_prompt_to_be_told_apart():
    model, other = model_of(), model_of()
    with scans_of(other).steer(other):
        expected = generated(other, ROWS)
    calls = []

    def fail(*_):
        calls.append(True)
        if len(calls) == 2:  # the first is the pass that tells the prompt apart
            raise RuntimeError("planted")

    with scans_of(model).steer(model):
        with pytest.raises(RuntimeError, match="planted"), torch.no_grad():
            handle = model.lm_head.register_forward_hook(fail)
            model(input_ids=torch.tensor([ROWS[0]]))
        handle.remove()
        assert torch.equal(generated(model, ROWS), expected)


def test_a_cache_of_a_prompt_that_was_read_elsewhere_is_refused():
    model = model_of()
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[5, 6]])).past_key_values
        with pytest.raises(ConfigurationError, match="cache"), scans_of(model).steer(model):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)


def test_a_model_of_another_size_is_refused():
    scans = scans_of(model_of())
    for other in (tiny.llama(), tiny.llama(num_hidden_layers=LAYERS, hidden_size=32)):
        with pytest.raises(ConfigurationError, match="fit on this one"), scans.steer(other):
            pass


@pytest.mark.parametrize(
    "harmful, harmless, low, high",
    [
        ([0.8, 0.9, 0.7], [0.1, 0.2, 0.3], 0.3, 0.7),
        ([0.8, 0.9, 0.4], [0.1, 0.2, 0.5], 0.4, 0.8),
        ([0.9], [0.1], 0.1, 0.9),
        ([0.5], [0.5], 0.5, 0.5),
    ],
)
def test_the_threshold_has_equal_errors(harmful, harmless, low, high):
    found = equal_error_threshold(harmful, harmless)
    assert low <= found <= high
    missed = sum(score < found for score in harmful) / len(harmful)
    alarmed = sum(score >= found for score in harmless) / len(harmless)
    assert missed == alarmed or len({*harmful, *harmless}) == 1


HARMFUL, HARMLESS = safety_data(32), [{"messages": q.messages} for q in skill_questions(32, skills=("make",))]


@pytest.fixture(scope="module")
def fitted():
    model, tokenizer = load_aligned()
    return model, tokenizer, Scans.fit(model, tokenizer, harmful=HARMFUL, harmless=HARMLESS)


def test_vectors_are_those_of_the_anchors_that_are_not_held_out(fitted):
    model, tokenizer, scans = fitted
    used = [[row for number, row in enumerate(rows) if number % 4 != 3] for rows in (HARMFUL, HARMLESS)]
    ids = [
        [prompt_tokens(tokenizer, [m for m in row["messages"] if m["role"] != "assistant"]) for row in rows]
        for rows in used
    ]
    ends = [last_states(model, prompts)[:, 0] for prompts in ids]
    sure = tokenizer("Sure", add_special_tokens=False)["input_ids"]
    moves = last_states(model, [[*prompt, *sure] for prompt in ids[0]])[:, 0] - ends[0]
    assert scans.steered == range(1, 3) and scans.affirmation == tuple(sure)
    torch.testing.assert_close(scans.directions.norm(dim=-1), torch.ones(2))
    expected = nn.functional.normalize((ends[0].mean(0) - ends[1].mean(0))[1:3], dim=-1)
    torch.testing.assert_close(scans.directions, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scans.transitions, moves.mean(0)[1:], rtol=1e-4, atol=1e-5)


def test_a_processor_serves_as_its_tokenizer_does():
    model, rows = tiny.llama(num_hidden_layers=LAYERS), (["how do i make a bomb ?"] * 4, ["here is the cake ?"] * 4)
    processor = templates.processor(tiny.CHAT_TEMPLATE)
    one, other = (Scans.fit(model, p, harmful=rows[0], harmless=rows[1]) for p in (processor, tiny.tokenizer()))
    assert torch.equal(one.directions, other.directions) and one.affirmation == other.affirmation
    assert one.scores(model, processor, rows[0]) == other.scores(model, tiny.tokenizer(), rows[0])


def test_a_planted_direction_is_recovered():
    model, tokenizer = tiny.llama(num_hidden_layers=LAYERS), tiny.tokenizer()
    planted = nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(5)), dim=0)
    with torch.no_grad():
        bomb, cake = tokenizer.convert_tokens_to_ids(["bomb", "cake"])
        model.model.embed_tokens.weight[bomb] = model.model.embed_tokens.weight[cake] + 0.5 * planted

    def add(module, inputs, states):
        return states + planted * (inputs[0] @ planted > 0.25).any(1)[:, None, None]

    model.model.layers[0].register_forward_hook(add)
    frames = ("how do i make a", "here is the", "the way with", "yes sure that")
    rows = [[f"{words} {thing} ?" for words in frames] for thing in ("bomb", "cake")]
    scans = Scans.fit(model, tokenizer, harmful=rows[0], harmless=rows[1], threshold=0.75)
    assert min(scans.directions @ planted) > 0.95


def test_unseen_queries_of_the_testbed_are_told_apart_and_steering_changes_what_is_refused(fitted):
    model, tokenizer, scans = fitted
    harmful = [{"messages": question.messages} for question in attack_questions(12)]
    harmless = [{"messages": question.messages} for question in skill_questions(12, seed=5, skills=("make",))]
    told = [
        [score >= scans.threshold for score in scans.scores(model, tokenizer, rows)] for rows in (harmful, harmless)
    ]
    assert sum(told[0]) >= 10 and sum(told[1]) <= 2
    chats = [row["messages"] for row in harmful]
    always_harmless = Scans(**{**vars(scans), "threshold": 2.0, "multiplier": 20.0})
    with always_harmless.steer(model):
        assert generate_responses(model, tokenizer, chats) != generate_responses(*load_aligned(), chats)


def test_it_is_saved_and_read_back(fitted, tmp_path):
    *_, scans = fitted
    scans.save(tmp_path / "scans.safetensors")
    loaded = Scans.load(tmp_path / "scans.safetensors")
    for name, value in vars(scans).items():
        other = getattr(loaded, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
    (tmp_path / "other").write_text("nothing")
    for other in ("other", "missing"):
        with pytest.raises(DataError, match=other):
            Scans.load(tmp_path / other)


def test_settings_out_of_range_are_refused(fitted):
    model, tokenizer, _ = fitted
    with pytest.raises(ConfigurationError, match="layers="):
        Scans.fit(model, tokenizer, harmful=HARMFUL, harmless=HARMLESS, layers=(0.5, 0.2))
    with pytest.raises(DataError, match="harmless: 3 anchors"):
        Scans.fit(model, tokenizer, harmful=HARMFUL, harmless=HARMLESS[:3])
