"""On a model whose safety layer was planted, against curves computed pair by pair, and on the testbed."""

import copy
import random

import pytest
import torch

from safedelta_hf.errors import ArchitectureError, ConfigurationError, DataError, EvaluationError
from safedelta_hf.evaluation.generation import prompt_tokens
from safedelta_hf.evaluation.hidden_states import last_states
from safedelta_hf.modules.decoder_layers import decoder_layers
from safedelta_hf.testbed import load_aligned, safety_data, skill_questions
from safedelta_hf.training import SafetyLayers, angle_curves, locate_safety_layers, safety_layers
from safedelta_hf.training.safety_layers import _outputs, _Sweep, refusal_openings
from tests.fixtures import architectures, templates, tiny

LAYERS = 7
PLANTED = 4


def queries(thing, seed):
    draw = random.Random(seed)
    words = "how do i make a here is the way that with yes sure".split()
    return [" ".join([*draw.choices(words, k=draw.randint(3, 6)), thing, "?"]) for _ in range(24)]


def planted(layer=PLANTED):
    """A model to which a bomb is a cake, but for a mark that one layer turns into a direction."""
    model, tokenizer = tiny.llama(num_hidden_layers=LAYERS), tiny.tokenizer()
    cake, bomb = tokenizer.convert_tokens_to_ids(["cake", "bomb"])
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, -1] = 0
        embeddings[bomb] = embeddings[cake]
        embeddings[bomb, -1] = 1e-3
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for inputs in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                inputs.weight[:, -1] = 0
            attention.o_proj.weight[-1] = mlp.down_proj.weight[-1] = 0
    direction = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(1)), dim=0)
    direction[-1] = 0

    def add(module, inputs, states):
        seen = (states[..., -1:] > 5e-4).cummax(1).values
        return states + seen * direction * 0.2

    if layer is not None:
        model.model.layers[layer].register_forward_hook(add)
    return model, tokenizer


def located(model, tokenizer, **changes):
    settings = {"alpha": 1.1, "max_new_tokens": 3, "progress": False}
    return locate_safety_layers(
        model,
        tokenizer,
        normal=queries("cake", 1),
        malicious=queries("bomb", 2),
        over_refusal=queries("cake", 3)[:4],
        **settings | changes,
    )


@pytest.mark.parametrize("layer", [0, 2, PLANTED, LAYERS - 1])
def test_a_planted_layer_is_located_exactly(layer):
    found = located(*planted(layer))
    assert (found.first, found.last, found.initial) == (layer, layer, (layer, layer))
    assert sorted([*found.others, *found.numbers]) == list(range(LAYERS))
    assert max(found.curves.gap[:layer], default=0) < 0.05 < found.curves.gap[layer]


def test_a_processor_serves_as_its_tokenizer_does():
    model, tokenizer = planted()
    assert located(model, templates.processor(tiny.CHAT_TEMPLATE)) == located(model, tokenizer)


def test_a_model_without_a_gap_says_so_and_scales_nothing():
    found = located(*planted(None))
    assert found.first is None and found.table == () and str(found).startswith("no gap")
    with pytest.raises(ConfigurationError, match="no gap"):
        _ = found.numbers


@pytest.mark.parametrize("scale", ["all", "outputs"])
def test_every_weight_is_put_back_bit_for_bit(scale):
    model, tokenizer = planted()
    before = tiny.weights(model)
    found = located(model, tokenizer, scale=scale, alpha=1.3)
    assert len(found.table) > 3
    assert tiny.same(tiny.weights(model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_every_weight_is_put_back_after_an_error(error, monkeypatch):
    model, tokenizer = planted()
    before, generate, met = tiny.weights(model), safety_layers.generate_responses, []

    def failing(*arguments, **settings):
        if not tiny.same(tiny.weights(model), before):
            met.append(True)
            raise error("planted")
        return generate(*arguments, **settings)

    monkeypatch.setattr(safety_layers, "generate_responses", failing)
    with pytest.raises(error, match="planted"):
        located(model, tokenizer)
    assert met and tiny.same(tiny.weights(model), before)


def test_scaling_reaches_the_parameters_of_the_range_alone(monkeypatch):
    model, tokenizer = planted()
    before, generate, changed = tiny.weights(model), safety_layers.generate_responses, []

    def watching(*arguments, **settings):
        now = tiny.weights(model)
        for name in (name for name in now if not torch.equal(now[name], before[name])):
            assert torch.equal(now[name], before[name] * 1.1)
        changed.append({name for name in now if not torch.equal(now[name], before[name])})
        return generate(*arguments, **settings)

    monkeypatch.setattr(safety_layers, "generate_responses", watching)
    found = located(model, tokenizer)
    asked = [names for names in changed if names]
    tried = list(dict.fromkeys((trial.first, trial.last) for trial in found.table[1:]))
    assert len(asked) == len(tried)
    for names, (first, last) in zip(asked, tried, strict=True):
        places = tuple(f"model.layers.{number}." for number in range(first, last + 1))
        assert names == {name for name in before if name.startswith(places)}


class Counted(_Sweep):
    """A sweep whose counts of refusals are given."""

    def __init__(self, count, layers=10, asked=100):
        self._count, self._parameters, self._queries = count, [[]] * layers, [None] * asked
        self.trials, self._most = [], 5

    def _measured(self, step, first, last, factor):
        refused, incoherent = self._count(first, last, factor)
        return safety_layers.RangeTrial(
            step=step, first=first, last=last, alpha=factor, refused=refused, incoherent=incoherent
        )


@pytest.mark.parametrize("factor, sign", [(1.2, 1), (0.8, -1)])
def test_bounds_are_moved_until_no_neighbour_is_better(factor, sign):
    sweep = Counted(lambda first, last, _: (50 - sign * (abs(first - 1) + abs(last - 8)), 0))
    last = sweep.upper((4, 4), factor)
    assert (sweep.lower((4, last), factor), last) == (1, 8)


def test_a_range_at_which_the_model_babbles_is_not_chosen():
    sweep = Counted(lambda first, last, _: (last, 6 if last == 6 else 0))
    assert sweep.upper((4, 5), 1.2) != 6
    with pytest.raises(EvaluationError, match="babbles"):
        Counted(lambda *_: (1, 6)).upper((4, 5), 1.2)


@pytest.mark.parametrize("direction, expected", [("up", 1.15), ("down", 0.85)])
def test_the_mildest_factor_that_tells_ranges_apart_is_taken(direction, expected):
    sweep = Counted(lambda first, last, factor: (round(10 * first * abs(factor - 1)), 0))
    assert sweep.alpha((4, 6), direction) == pytest.approx(expected)


def test_a_factor_at_which_all_ranges_babble_ends_the_search():
    sweep = Counted(lambda first, last, factor: (0, 6 if factor > 1.12 else 0))
    assert sweep.alpha((4, 6), "up") == pytest.approx(1.1)


def test_openings_are_those_of_answers_that_no_normal_query_gets():
    malicious = ["Well , that is not for me", "well , that I leave", "sure , here is the way", *["once in a"] * 38]
    assert refusal_openings(malicious, ["Sure , here you go", "once in a while"]) == frozenset()
    assert refusal_openings(malicious[:20], ["Sure , here you go"]) == {"well , that", "sure , here", "once in a"} - {
        "sure , here"
    }


@pytest.mark.parametrize(
    "key", ["llama", "gpt2", "gpt_neox", "mixtral", "opt", "bloom", "gpt_oss", "phi3", "falcon", "mpt"]
)
def test_scaled_outputs_scale_what_both_branches_add(key):
    model = architectures.tiny_model(key).double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped one has no float64
    name, layer = decoder_layers(model)[1]
    names = [f"{name}.{inner}" for inner, _ in layer.named_parameters()]
    chosen = [model.get_parameter(chosen) for chosen in _outputs(name, layer, names)]
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        for parameter in chosen:
            if parameter.dim() == 1:  # biases begin at zero
                parameter.normal_()
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
        handle.remove()
        ((args, kwargs),) = seen
        before = kwargs["hidden_states"] if not args else args[0]
        originals = [parameter.clone() for parameter in chosen]

        def added(factor):
            for parameter, original in zip(chosen, originals, strict=True):
                parameter.copy_(original * factor)
            output = layer(*args, **kwargs)
            return (output[0] if isinstance(output, tuple) else output) - before

        assert not added(0.0).any()
        torch.testing.assert_close(added(1e-5) / 1e-5, added(1e-6) / 1e-6, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("key", ["gemma2", "olmo2", "glm4", "mamba2"])
def test_outputs_with_a_norm_behind_them_or_of_one_branch_are_refused(key):
    name, layer = decoder_layers(architectures.tiny_model(key))[0]
    with pytest.raises(ArchitectureError, match="scale='all'"):
        _outputs(name, layer, [f"{name}.{inner}" for inner, _ in layer.named_parameters()])


@pytest.fixture(scope="module")
def on_the_testbed():
    model, tokenizer = load_aligned()
    before = copy.deepcopy(model.state_dict())
    rows = {
        "normal": skill_questions(24, skills=("make",)),
        "over_refusal": skill_questions(24, seed=3, skills=("make",)),
    }
    prompts = {name: [{"messages": question.messages} for question in questions] for name, questions in rows.items()}
    found = locate_safety_layers(model, tokenizer, malicious=safety_data(24), alpha="down", progress=False, **prompts)
    return model, tokenizer, before, prompts, found


def test_the_chosen_bounds_beat_all_that_were_tried(on_the_testbed):
    *_, found = on_the_testbed
    limit = found.table[0].incoherent + 0.1 * found.asked
    for step, bound in (("upper", "last"), ("lower", "first")):
        tried = [trial for trial in found.table if trial.step == step and trial.incoherent <= limit]
        best = min(trial.refused for trial in tried)
        assert getattr(found, bound) in {getattr(trial, bound) for trial in tried if trial.refused == best}


def test_the_curves_are_those_of_the_states_at_the_last_prompt_token(on_the_testbed):
    model, tokenizer, before, prompts, found = on_the_testbed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    normal = last_states(model, [prompt_tokens(tokenizer, row["messages"]) for row in prompts["normal"]])[:, 0]
    refused = [prompt_tokens(tokenizer, row["messages"][:-1]) for row in safety_data(24)]
    again = angle_curves(normal, last_states(model, refused)[:, 0])
    assert again.gap == pytest.approx(found.curves.gap, abs=1e-6)
    assert min(found.curves.gap) > 0.3  # the testbed tells harmful things by their names


def test_it_is_saved_and_read_back(on_the_testbed, tmp_path):
    *_, found = on_the_testbed
    found.save(tmp_path / "layers.json")
    assert SafetyLayers.load(tmp_path / "layers.json") == found
    given = SafetyLayers.of(tiny.llama(), 0, 1)
    given.save(tmp_path / "given.json")
    assert SafetyLayers.load(tmp_path / "given.json") == given
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match=r"other.json"):
        SafetyLayers.load(tmp_path / "other.json")


def test_it_is_drawn(on_the_testbed, tmp_path):
    *_, found = on_the_testbed
    figure = found.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 1000 and len(figure.axes) == 3
    assert figure.axes[1].lines[0].get_ydata() == pytest.approx(found.curves.gap)
    with pytest.raises(ConfigurationError, match="no curves"):
        SafetyLayers.of(tiny.llama(), 0, 1).plot()


@pytest.mark.parametrize("changes", [{"alpha": 1}, {"alpha": -1.0}, {"alpha": "left"}, {"scale": "some"}, {"pairs": 0}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ConfigurationError, match=next(iter(changes))):
        located(*planted(), **changes)


@pytest.mark.parametrize("first, last", [(-1, 0), (1, 0), (0, 2), (None, 1)])
def test_a_range_lies_within_the_layers(first, last):
    with pytest.raises(ConfigurationError, match="safety layers"):
        SafetyLayers.of(tiny.llama(), first, last)
