"""Weights are moved by the formula, from the original each time, and put back bit for bit."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from safedelta_hf.errors import BaseWeightsError, ConfigurationError, DataError, NumericalError, OutputError
from safedelta_hf.evaluation import Interpolation, Landscape, Metric, interpolation, safety_landscape
from safedelta_hf.evaluation.landscape import UNSAFE, basin_of, direction, moved, visage_of
from tests.fixtures import architectures, tiny


class Watching:
    """A metric that keeps the weights that it is shown."""

    def __init__(self, value=lambda model: 0.25, fails_at=None, error=RuntimeError):
        self.seen, self.value, self.fails_at, self.error = [], value, fails_at, error

    def __call__(self, model):
        self.seen.append(tiny.weights(model))
        if len(self.seen) == self.fails_at:
            raise self.error("planted")
        return self.value(model)

    @property
    def metric(self):
        return Metric(name="watched", measure=self)


def landscape(model, watching, **changes):
    return safety_landscape(model, watching.metric, **{"directions": 2, "points": 5, "progress": False} | changes)


def oracle(weight, name, number, alpha, seed=0):
    """The formula, in float64."""
    along = direction(name, weight.shape, seed=seed, number=number).double()
    return weight.double() + alpha * along / along.norm() * weight.double().norm()


def test_each_point_is_the_formula_on_the_original_weights():
    model, watching = tiny.llama(), Watching()
    before = tiny.weights(model)
    found = landscape(model, watching)
    assert found.alphas == (-0.5, -0.25, 0.0, 0.25, 0.5)
    places = [(0, 0.0), *((number, alpha) for number in (0, 1) for alpha in (-0.5, -0.25, 0.25, 0.5))]
    assert len(watching.seen) == len(places)
    for seen, (number, alpha) in zip(watching.seen, places, strict=True):
        for name, weight in before.items():
            if "norm" in name or alpha == 0:
                assert torch.equal(seen[name], weight)
            else:
                torch.testing.assert_close(
                    seen[name].double(), oracle(weight, name, number, alpha), rtol=1e-6, atol=1e-7
                )
                along = direction(name, weight.shape, seed=0, number=number)
                assert torch.equal(seen[name], moved(weight, along, alpha))  # no drift from step to step
                length = (seen[name] - weight).norm().item()
                assert length == pytest.approx(abs(alpha) * weight.norm().item(), rel=1e-5)
    assert tiny.same(tiny.weights(model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 4])
def test_all_weights_are_put_back_after_an_error(error, call):
    model = tiny.llama().bfloat16()
    before = tiny.weights(model)
    with pytest.raises(error, match="planted"):
        landscape(model, Watching(fails_at=call, error=error))
    assert tiny.same(tiny.weights(model), before)


def test_a_direction_depends_on_its_seed_number_and_name_alone():
    one = direction("a.weight", (4, 3), seed=0, number=0)
    assert torch.equal(one, direction("a.weight", (4, 3), seed=0, number=0))
    for other in ({"seed": 1, "number": 0}, {"seed": 0, "number": 1}):
        assert not torch.equal(one, direction("a.weight", (4, 3), **other))
    assert not torch.equal(one, direction("b.weight", (4, 3), seed=0, number=0))
    assert torch.equal(one.flatten(), direction("a.weight", (12,), seed=0, number=0))


def test_a_weight_of_zeros_and_one_of_a_single_entry_are_moved_by_their_length():
    assert not moved(torch.zeros(3), torch.ones(3), 0.5).any()
    assert moved(torch.tensor([2.0]), torch.tensor([-0.1]), 0.5).item() == pytest.approx(1.0)


def test_tied_weights_are_moved_once():
    model, watching = tiny.llama(tied=True), Watching()
    weight = model.lm_head.weight.detach().clone()
    landscape(model, watching, directions=1, points=3)
    expected = oracle(weight, "model.embed_tokens.weight", 0, 0.5)
    torch.testing.assert_close(watching.seen[-1]["model.embed_tokens.weight"].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("key", ["gpt2", "mixtral", "gemma2"])
def test_norm_layers_stay_whatever_they_are_called(key):
    model, watching = architectures.tiny_model(key), Watching()
    before = tiny.weights(model)
    landscape(model, watching, directions=1, points=3)
    still = {name for name, weight in before.items() if torch.equal(watching.seen[-1][name], weight) and weight.any()}
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    assert still == {name for name in before if name.rpartition(".")[0] in norms and before[name].any()}
    assert tiny.same(tiny.weights(model), before)


def test_adapters_stay_and_what_they_adapt_is_moved():
    bare, watching, adapted = (
        Watching(),
        Watching(),
        get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])),
    )
    before = tiny.weights(adapted)
    value = landscape(adapted, watching, directions=1, points=3)
    assert tiny.same(tiny.weights(adapted), before)
    assert value == landscape(tiny.llama(), bare, directions=1, points=3)
    for seen, expected in zip(watching.seen, bare.seen, strict=True):
        mine = {name.replace("base_model.model.", "").replace(".base_layer", ""): w for name, w in seen.items()}
        assert all(torch.equal(mine[name], weight) for name, weight in expected.items())
        assert all(torch.equal(weight, before[name]) for name, weight in seen.items() if "lora_" in name)


@pytest.mark.parametrize(
    "percents, expected, visage",
    [
        ([37] * 5, (0, 4), 63),
        ([100, 100, 0, 100, 100], (2, 2), 100),
        ([100, 20, 0, 40, 100], (1, 3), 80),
        ([100, 100, 30, 50, 70], (2, 4), 50),
        ([60, 100, 20, 100, 40], (2, 2), 80),
        ([100, 100, 100, 100, 100], (2, 2), 0),
        ([100, 100, 100, 20, 20], (2, 2), 0),
    ],
    ids=["flat", "one point", "step", "one side", "outer dip", "unsafe", "unsafe itself on one side"],
)
def test_visage_is_mean_safety_in_the_basin(percents, expected, visage):
    values = [percent / 100 for percent in percents]
    assert basin_of(values) == expected
    assert visage_of(values) == pytest.approx(visage)


def test_a_point_at_the_limit_is_inside_the_basin():
    assert basin_of([UNSAFE, UNSAFE, 0.0, UNSAFE, UNSAFE]) == (0, 4)
    assert basin_of([1.0, UNSAFE, 0.0, UNSAFE, 1.0]) == (1, 3)


def test_visage_is_averaged_over_directions():
    found = Landscape(metric="m", alphas=(-0.5, 0.0, 0.5), values=((0.2, 0.2, 0.2), (1.0, 0.4, 0.4)), seed=0)
    assert found.visage == pytest.approx((80 + 60) / 2)
    assert found.basins == ((-0.5, 0.5), (0.0, 0.5)) and found.basin == (-0.25, 0.5)


@pytest.mark.parametrize("fails_at", [2, 5])
def test_a_run_that_was_killed_goes_on(fails_at, tmp_path):
    def value(model):
        return float(model.lm_head.weight.detach().abs().mean().clamp(max=1))

    whole = landscape(tiny.llama(), Watching(value))
    with pytest.raises(KeyboardInterrupt):
        landscape(tiny.llama(), Watching(value, fails_at, KeyboardInterrupt), output=tmp_path / "log.jsonl")
    rest = Watching(value)
    assert landscape(tiny.llama(), rest, output=tmp_path / "log.jsonl") == whole
    assert len(rest.seen) == 9 - (fails_at - 1)
    more = Watching(value)
    assert landscape(tiny.llama(), more, output=tmp_path / "log.jsonl", directions=3).values[:2] == whole.values
    assert len(more.seen) == 4


def test_a_file_of_another_model_metric_or_setting_is_refused(tmp_path):
    landscape(tiny.llama(), Watching(), output=tmp_path / "log.jsonl")
    with pytest.raises(OutputError, match="landscape of"):
        landscape(tiny.perturbed(tiny.llama()), Watching(), output=tmp_path / "log.jsonl")
    with pytest.raises(OutputError, match="radius"):
        landscape(tiny.llama(), Watching(), output=tmp_path / "log.jsonl", radius=0.3)
    with pytest.raises(OutputError, match="metrics"):
        metric = Metric(name="watched", measure=Watching(), fingerprint="other prompts")
        safety_landscape(tiny.llama(), metric, points=5, output=tmp_path / "log.jsonl", progress=False)


@pytest.mark.parametrize("changes", [{"points": 4}, {"points": 1}, {"directions": 0}, {"radius": 0.0}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ConfigurationError, match=next(iter(changes))):
        landscape(tiny.llama(), Watching(), **changes)


@pytest.mark.parametrize("value, error", [(1.5, ConfigurationError), (float("nan"), NumericalError)])
def test_values_that_no_landscape_has_are_refused_and_the_weights_are_back(value, error):
    model = tiny.llama()
    before = tiny.weights(model)
    with pytest.raises(error, match="watched"):
        landscape(model, Watching(lambda _: value))
    assert tiny.same(tiny.weights(model), before)


def test_packed_weights_are_refused():
    model = tiny.llama()
    model.lm_head.weight = nn.Parameter(torch.ones(48, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigurationError, match="packed"):
        landscape(model, Watching())


def test_a_landscape_is_saved_read_back_and_drawn(tmp_path):
    found = Landscape(metric="m", alphas=(-0.5, 0.0, 0.5), values=((0.2, 0.2, 0.2), (1.0, 0.4, 0.4)), seed=3)
    found.save(tmp_path / "landscape.json")
    assert Landscape.load(tmp_path / "landscape.json") == found
    figure = found.plot(tmp_path / "landscape.png")
    assert list(figure.axes[0].lines[1].get_ydata()) == [1.0, 0.4, 0.4] and (tmp_path / "landscape.png").exists()
    assert "+0.500" in str(found) and "VISAGE 70.0" in str(found)
    for other in (
        {"metric": "m"},
        {"metric": "m", "alphas": 0.5, "values": [], "seed": 3},
        [],
        {**vars(found), "n": 1},
    ):
        (tmp_path / "other.json").write_text(json.dumps(other))
        with pytest.raises(DataError, match=r"other.json is no saved landscape"):
            Landscape.load(tmp_path / "other.json")


def three_models():
    return tiny.llama(), tiny.perturbed(tiny.llama(), seed=1), tiny.perturbed(tiny.llama(), seed=2)


@pytest.mark.parametrize("in_files", [False, True])
def test_the_ends_of_each_line_are_the_models_bit_for_bit_and_its_middle_is_their_mean(in_files, tmp_path):
    base, tuned, adjusted = three_models()
    before, watching = tiny.weights(tuned), Watching()
    sources = [base, adjusted]
    if in_files:
        sources = [tmp_path / "base", tmp_path / "adjusted"]
        for model, folder in zip((base, adjusted), sources, strict=True):
            model.save_pretrained(folder)
    found = interpolation(sources[0], tuned, sources[1], metrics=[watching.metric], points=3, progress=False)
    assert found.positions == (0, 0.5, 1, 1.5, 2) and found.values == {"watched": (0.25,) * 5}
    for place, model in ((0, base), (4, adjusted)):
        assert tiny.same(watching.seen[place], tiny.weights(model))
    assert tiny.same(watching.seen[2], before) and tiny.same(tiny.weights(tuned), before)
    for place, model in ((1, base), (3, adjusted)):
        for name, weight in tiny.weights(model).items():
            torch.testing.assert_close(watching.seen[place][name], (weight + before[name]) / 2)


def test_an_interpolation_that_was_killed_goes_on_metric_by_metric(tmp_path):
    def run(first, second, **changes):
        metrics = [Metric(name="one", measure=first), Metric(name="two", measure=second)]
        return interpolation(*three_models(), metrics=metrics, points=2, progress=False, **changes)

    def value(model):
        return float(model.lm_head.weight.detach().sum())

    whole = run(Watching(value), Watching(value))
    tuned = tiny.perturbed(tiny.llama(), seed=1)
    with pytest.raises(KeyboardInterrupt):
        run(Watching(value), Watching(value, 2, KeyboardInterrupt), output=tmp_path / "log.jsonl")
    first, second = Watching(value), Watching(value)
    assert run(first, second, output=tmp_path / "log.jsonl") == whole
    assert (len(first.seen), len(second.seen)) == (1, 2)
    with pytest.raises(OutputError, match="adjusted"):
        metrics = [Metric(name=name, measure=value) for name in ("one", "two")]
        interpolation(
            tiny.llama(), tuned, tiny.llama(), metrics=metrics, points=2, progress=False, output=tmp_path / "log.jsonl"
        )


@pytest.mark.parametrize("place", [0, 1, 2])
def test_models_with_adapters_on_them_are_refused(place):
    models = list(three_models())
    models[place] = get_peft_model(models[place], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigurationError, match="merge_and_unload"):
        interpolation(*models, metrics=[Watching().metric])


def test_a_model_of_another_shape_is_refused_and_the_weights_are_back():
    base, tuned, _ = three_models()
    before = tiny.weights(tuned)
    with pytest.raises(BaseWeightsError, match=r"gate_proj.*\[32, 16\]"):
        interpolation(base, tuned, tiny.llama(intermediate_size=32), metrics=[Watching().metric], progress=False)
    with pytest.raises(BaseWeightsError, match="adjusted: "):
        interpolation(base, tuned, tuned, metrics=[Watching().metric])
    assert tiny.same(tiny.weights(tuned), before)


@pytest.mark.parametrize("metrics, points", [([], 3), (["a", "a"], 3), (["a"], 1)])
def test_an_interpolation_needs_metrics_by_different_names_and_two_points(metrics, points):
    made = [Metric(name=name, measure=Watching()) for name in metrics]
    with pytest.raises(ConfigurationError, match="points="):
        interpolation(*three_models(), metrics=made, points=points)


def test_an_interpolation_is_saved_read_back_and_drawn_in_one_figure(tmp_path):
    found = Interpolation(positions=(0, 1, 2), values={"attack_success": (0, 1, 0), "task_accuracy": (0, 1, 0.9)})
    found.save(tmp_path / "way.json")
    assert Interpolation.load(tmp_path / "way.json") == found
    (axes,) = found.plot(tmp_path / "way.png").axes
    assert [line.get_label() for line in axes.lines[:2]] == ["attack success", "task accuracy"]
    assert "task_accuracy" in str(found) and (tmp_path / "way.png").exists()
