"""What is watched of a model is known before it reads, and what cannot be is named."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from safedelta_hf.capture import watched_model as module
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.capture.watched_model import WatchedModel, computed_weights, packed_products
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import CaptureError, ConfigurationError, NumericalError
from safedelta_hf.modules.parametrised import parametrised_weights
from tests.capture.test_reading import collect
from tests.fixtures import tiny


def test_nan_in_a_weight_names_it(llama, safety_rows):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        collect(llama, safety_rows)


def test_encoder_decoder_models_are_a_named_error(safety_rows):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=tiny.VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(CaptureError, match="encoder-decoder"):
        collect(T5ForConditionalGeneration(config), safety_rows)


def test_what_is_watched_is_every_weight_and_what_is_chosen_those_asked_for():
    model = tiny.Plain()
    everything = WatchedModel.of(ShardedModel(model), ProfileConfig())
    assert {name: tuple(one.shape) for name, one in everything.matrices.items()} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert everything.chosen == set(everything.matrices) and everything.module is model
    assert WatchedModel.of(ShardedModel(model), ProfileConfig(targets=["up"])).chosen >= {"up.weight"}
    assert "down.weight" not in WatchedModel.of(ShardedModel(model), ProfileConfig(targets=["up"])).chosen


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_the_weight_of_the_output_projection_under_its_canonical_name(tied):
    watched = WatchedModel.of(ShardedModel(tiny.llama(tied=tied)), ProfileConfig())
    assert watched.head == ("model.embed_tokens.weight" if tied else "lm_head.weight")
    assert WatchedModel.of(ShardedModel(tiny.Plain()), ProfileConfig()).head is None


def test_the_head_is_found_where_its_weight_is_computed():
    model = tiny.llama()
    parametrizations.weight_norm(model.lm_head)
    watched = WatchedModel.of(ShardedModel(model), ProfileConfig())
    assert watched.head == "lm_head.weight" and set(watched.computed) == {"lm_head.weight"}
    assert not any("parametrizations" in name for name in watched.matrices)


def test_every_parameter_that_is_not_covered_has_its_reason():
    watched = WatchedModel.of(ShardedModel(tiny.Plain()), ProfileConfig())
    reasons = watched.reasons(["up.weight", "up.bias"], {"down.weight": "why"})
    assert set(reasons) == {"embed.weight", "down.weight", "down.bias"} and reasons["down.weight"] == "why"
    assert reasons["embed.weight"] == "the safety data never reached it, unless inside a fused kernel, in Embedding"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_base_that_holds_no_numbers_is_named_after_all_of_it_was_read(value, monkeypatch):
    model, read = tiny.Plain(), []
    with torch.no_grad():
        model.embed.weight[3, 1] = value
    whole = ShardedModel.read
    monkeypatch.setattr(ShardedModel, "read", lambda self, name: read.append(name) or whole(self, name))
    with pytest.raises(NumericalError, match=r"^embed\.weight: the base model holds NaN or Inf"):
        WatchedModel.of(ShardedModel(model), ProfileConfig())
    assert read == list(ShardedModel(model).all_names)


class Elsewhere(ShardedModel):
    kind = "a backend"


def test_weights_that_are_computed_from_shards_are_named():
    model = tiny.Plain()
    parametrizations.weight_norm(model.up)
    with pytest.raises(ConfigurationError, match=r"^up\.weight: .* not covered in a model under a backend"):
        WatchedModel.of(Elsewhere(model), ProfileConfig())
    WatchedModel.of(ShardedModel(model), ProfileConfig())


class Told:
    """Stands in for the observer."""

    def __init__(self):
        self.told = []

    def pause(self):
        self.told.append("pause")

    def packed_product(self, weight, bias, inputs, outputs):
        self.told.append((weight, bias, inputs, outputs))

    def computed_weight(self, name, weight):
        self.told.append((name, weight))


def hooks_of(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("keyword", [False, True])
def test_a_packed_layer_tells_what_it_read_and_its_inside_is_not_looked_at(keyword, monkeypatch):
    model, told, inputs = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False)), Told(), torch.randn(5, 4)
    packed = [model[0].weight, model[1].weight]
    monkeypatch.setattr(module, "is_quantised", lambda weight: any(weight is one for one in packed))
    with packed_products(model, told):
        hidden = model[0](input=inputs) if keyword else model[0](inputs)
        outputs = model[1](hidden)
    assert told.told[::2] == ["pause", "pause"] and hooks_of(model) == [0, 0, 0]
    first, second = told.told[1::2]
    assert first[:2] == ("0.weight", "0.bias") and second[:2] == ("1.weight", None)
    assert first[2] is inputs and first[3] is second[2] is hidden and second[3] is outputs


def test_a_packed_layer_of_other_widths_than_it_says_is_named(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].out_features = 7
    monkeypatch.setattr(module, "is_quantised", lambda weight: weight is model[0].weight)
    with (
        pytest.raises(CaptureError, match="^0: this Linear of 4 inputs and 7 outputs turned 4 into 3"),
        packed_products(model, Told()),
    ):
        model(torch.randn(5, 4))
    assert hooks_of(model) == [0, 0]


def test_a_computed_weight_is_told_as_it_is_computed():
    model, told = nn.Linear(4, 3), Told()
    parametrizations.weight_norm(model)
    with computed_weights(parametrised_weights(model).values(), told):
        weight = model.weight
    assert told.told[0] == "pause" and told.told[1][0] == "weight" and told.told[1][1].equal(weight)
    model.weight.sum()
    assert len(told.told) == 2
