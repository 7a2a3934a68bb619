"""Frozen layers stay as they are, bit for bit, and adapters go on all others."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from safedelta_hf.errors import ArchitectureError, BaseWeightsError, ConfigurationError
from safedelta_hf.modules.decoder_layers import decoder_layers
from safedelta_hf.training import FreezeSafetyLayers, SafetyLayers, freeze_layers, lora_layers
from tests.fixtures import architectures, tiny

KEYS = ["llama", "gpt2", "mpt", "opt", "mixtral", "bert", "gemma3"]
"""Lists called layers, h, blocks, decoder.layers, layers with experts, layer, language_model.layers."""


@pytest.mark.parametrize("key", KEYS)
def test_the_parameters_of_the_layers_are_frozen_and_no_others(key):
    model = architectures.tiny_model(key)
    layers = SafetyLayers.of(model, 1, 1)
    frozen = freeze_layers(model, layers)
    named = dict(model.named_parameters())
    assert set(frozen) == {name for name, parameter in named.items() if not parameter.requires_grad}
    assert set(frozen) == {name for name in named if name.startswith(f"{layers.names[1]}.")}
    assert {named[name] for name in frozen} == set(decoder_layers(model)[1][1].parameters())


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("targets", ["all-linear", "listed"])
def test_adapters_go_on_the_complement(key, targets):
    model = architectures.tiny_model(key)
    layers = SafetyLayers.of(model, 0, 0)
    last = decoder_layers(model)[-1][1]
    kinds = [
        name.rpartition(".")[2]
        for name, module in last.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    config = LoraConfig(r=2, target_modules="all-linear" if targets == "all-linear" else kinds)
    adapted = get_peft_model(model, lora_layers(layers, config))
    places = {
        name: [n for n, _ in module.named_parameters() if "lora_" in n] for name, module in decoder_layers(adapted)
    }
    if (key, targets) == ("mixtral", "all-linear"):  # PEFT adapts the experts of every layer
        places[layers.names[0]] = [name for name in places[layers.names[0]] if "mlp." not in name]
    assert not places[layers.names[0]]
    assert all(places[layers.names[number]] for number in layers.others)
    assert config.layers_to_transform is None and config.exclude_modules is None


def test_experts_that_peft_adapts_in_every_layer_are_frozen_at_zero(tmp_path):
    model = architectures.tiny_model("mixtral")
    layers = SafetyLayers.of(model, 0, 0)
    before = tiny.weights(model)
    adapted = get_peft_model(model, lora_layers(layers, LoraConfig(r=2, target_modules="all-linear")))
    with pytest.raises(ConfigurationError, match="lora_A"):
        tiny.trainer(adapted, FreezeSafetyLayers(layers), tmp_path).train()
    freeze_layers(adapted, layers)
    tiny.trainer(adapted, FreezeSafetyLayers(layers), tmp_path).train()
    merged = tiny.weights(adapted.merge_and_unload())
    assert all(torch.equal(merged[name], before[name]) for name in before if ".layers.0." in name)
    assert not tiny.same(merged, before)


def test_a_layer_is_not_taken_for_another_whose_number_begins_alike():
    model = tiny.llama(num_hidden_layers=12)
    layers = SafetyLayers.of(model, 1, 1)
    for targets in ("all-linear", ["q_proj"]):
        adapted = get_peft_model(
            tiny.llama(num_hidden_layers=12), lora_layers(layers, LoraConfig(target_modules=targets))
        )
        with_adapters = {
            name for name, layer in decoder_layers(adapted) if any("lora_" in n for n, _ in layer.named_parameters())
        }
        assert with_adapters == {layers.names[number] for number in layers.others}


@pytest.mark.parametrize(
    "settings",
    [{"layers_to_transform": [0]}, {"exclude_modules": ["lm_head"]}, {"target_parameters": ["mlp.experts.down_proj"]}],
)
def test_a_configuration_that_chooses_layers_itself_is_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        lora_layers(SafetyLayers.of(tiny.llama(), 0, 0), LoraConfig(target_modules=["q_proj"], **settings))


def test_adapters_need_a_layer_that_is_left():
    with pytest.raises(ConfigurationError, match="nothing is left"):
        lora_layers(SafetyLayers.of(tiny.llama(), 0, 1), LoraConfig(target_modules=["q_proj"]))


def test_layers_of_another_model_are_refused():
    with pytest.raises(ArchitectureError, match="2 decoder layers"):
        freeze_layers(tiny.llama(), SafetyLayers.of(tiny.llama(num_hidden_layers=3), 1, 1))


def test_frozen_layers_are_bit_identical_after_training_and_the_optimizer_does_not_know_them(tmp_path):
    model = tiny.llama(num_hidden_layers=3)
    layers = SafetyLayers.of(model, 1, 1)
    frozen, before = freeze_layers(model, layers), tiny.weights(model)
    trainer = tiny.trainer(model, FreezeSafetyLayers(layers), tmp_path, weight_decay=0.1)
    trainer.train()
    after = tiny.weights(model)
    assert {name for name in after if torch.equal(after[name], before[name])} == set(frozen)
    held = {parameter for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not any(
        model.get_parameter(name) in held or model.get_parameter(name) in trainer.optimizer.state for name in frozen
    )


def test_adapters_inside_frozen_layers_are_frozen_too(tmp_path):
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    layers = SafetyLayers.of(model, 0, 0)
    with pytest.raises(ConfigurationError, match="lora_A"):
        tiny.trainer(model, FreezeSafetyLayers(layers), tmp_path).train()
    freeze_layers(model, layers)
    before = tiny.weights(model)
    tiny.trainer(model, FreezeSafetyLayers(layers), tmp_path).train()
    changed = {name for name, value in tiny.weights(model).items() if not torch.equal(value, before[name])}
    assert changed and all("layers.1." in name for name in changed)


def test_layers_that_are_not_frozen_stop_the_training_before_it_begins(tmp_path):
    model = tiny.llama()
    before = tiny.weights(model)
    with pytest.raises(ConfigurationError, match="freeze_layers"):
        tiny.trainer(model, FreezeSafetyLayers(SafetyLayers.of(model, 0, 0)), tmp_path).train()
    assert tiny.same(tiny.weights(model), before)


def test_an_optimizer_that_holds_them_is_refused(tmp_path):
    model = tiny.llama()
    layers = SafetyLayers.of(model, 0, 0)
    trainer = tiny.trainer(model, FreezeSafetyLayers(layers), tmp_path)
    trainer.create_optimizer()
    freeze_layers(model, layers)
    with pytest.raises(ConfigurationError, match="optimizer"):
        trainer.train()


class Meddling(TrainerCallback):
    def __init__(self, name):
        self.name = name

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(value for name, value in model.named_parameters() if self.name in name)[0, 0] += 1e-3


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.weight", "layers.0.self_attn.q_proj.lora_B"])
def test_what_changes_them_all_the_same_is_told_at_the_end(name, tmp_path):
    model = tiny.llama()
    if "lora" in name:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    layers = SafetyLayers.of(model, 0, 0)
    freeze_layers(model, layers)
    trainer = tiny.trainer(model, FreezeSafetyLayers(layers), tmp_path)
    trainer.add_callback(Meddling(name))
    with pytest.raises(BaseWeightsError, match=name):
        trainer.train()
