"""The delta of a layer that can be merged, whatever its tuner does, and the LoRA nearest to it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from safedelta_hf.adapter.merged_layers import MergedDelta, best_factors, write_lora
from safedelta_hf.errors import AdapterError
from tests.fixtures import by_hand


class Tuner(nn.Module):
    """Adds something to the weight of its layer once it is merged."""

    def __init__(self, layer, change, error=None, bias=0.0):
        super().__init__()
        self.base_layer, self.change, self.error, self.bias = layer, change, error, bias

    def get_base_layer(self):
        return self.base_layer

    def merge(self, *, safe_merge, adapter_names):
        assert safe_merge and adapter_names == ["mine"]
        if self.error is not None:
            raise self.error
        self.base_layer.weight.data += self.change.to(self.base_layer.weight)
        if self.bias:
            self.base_layer.bias.data += self.bias


def delta_of(layer, change, rank=2, parameter="up.weight", **settings):
    shape = tuple(layer.weight.shape)
    tuner = Tuner(layer, change, **settings)
    return MergedDelta(parameter=parameter, shape=shape, tensors={}, layer=tuner, adapter="mine", rank=rank)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_factors_are_those_of_the_nearest_product_of_their_rank(shape, rank):
    matrix = torch.randn(shape)
    up, down = best_factors(matrix, rank)
    kept = min(rank, *shape)
    assert up.shape == (shape[0], kept) and down.shape == (kept, shape[1])
    values = torch.linalg.svdvals(matrix.double())
    left_out = float((matrix.double() - up.double() @ down.double()).norm())
    assert left_out == pytest.approx(float(values[kept:].square().sum().sqrt()), abs=1e-5)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_delta_is_what_merging_adds_in_float32_and_the_layer_is_left_alone(dtype):
    layer, change = nn.Linear(4, 6).to(dtype), 1e-3 * torch.randn(6, 4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    delta = delta_of(layer, change)
    torch.testing.assert_close(delta.delta().values, change, rtol=1e-3, atol=1e-6)
    assert delta.is_dense
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (".lora_A.weight", ".lora_B.weight"), False),
    "conv1d": (lambda: Conv1D(6, 4), (".lora_A.weight", ".lora_B.weight"), True),
    "embedding": (lambda: nn.Embedding(6, 4), (".lora_embedding_A", ".lora_embedding_B"), True),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [1, 4])
def test_the_lora_of_a_layer_means_its_delta_but_for_what_the_note_says_is_left_out(kind, rank):
    make, ends, inputs_first = LAYERS[kind]
    layer = make()
    change = torch.randn(layer.weight.shape)
    delta = delta_of(layer, change, rank)
    tensors, written, (note,) = delta.adjusted(delta.delta())
    down, up = (tensors[f"base_model.model.up{end}"].double() for end in ends)
    expected = change.double().T if inputs_first else change.double()
    values = torch.linalg.svdvals(expected)
    share = 100 * float(values[rank:].norm() / values.norm())
    assert float((up @ down - expected).norm() / expected.norm()) == pytest.approx(share / 100, abs=1e-4)
    torch.testing.assert_close(
        written.values.double(), (up @ down).T if inputs_first else up @ down, rtol=1e-5, atol=1e-6
    )
    told = re.fullmatch(rf"rank {rank} leaves out (\S+)% of the norm of the adjusted delta", note)
    assert float(told.group(1)) == pytest.approx(share, abs=0.02)


def test_a_delta_of_nothing_is_left_out_by_no_rank():
    delta = delta_of(nn.Linear(4, 6), torch.zeros(6, 4))
    tensors, _, (note,) = delta.adjusted(delta.delta())
    assert not any(tensor.any() for tensor in tensors.values()) and "leaves out 0.00%" in note


@pytest.mark.parametrize("error", [NotImplementedError("no"), RuntimeError("no"), ValueError("no")])
def test_a_layer_that_cannot_be_merged_is_named(error):
    delta = delta_of(nn.Linear(4, 6), torch.ones(6, 4), error=error)
    with pytest.raises(AdapterError, match=r"^up\.weight: its adapter cannot be merged into a weight \(no\)"):
        delta.delta()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), AttributeError("no"), TypeError("no")])
def test_what_is_no_fault_of_the_adapter_is_not_called_one(error):
    with pytest.raises(type(error), match="^no$"):
        delta_of(nn.Linear(4, 6), torch.ones(6, 4), error=error).delta()


def test_a_change_of_the_bias_is_named():
    with pytest.raises(AdapterError, match=r"^up\.weight: the adapter changes the bias"):
        delta_of(nn.Linear(4, 6), torch.ones(6, 4), bias=0.5).delta()


def test_the_folder_gives_each_layer_its_rank_and_every_product_the_scaling_one(tmp_path):
    layers = {"up": nn.Linear(8, 6), "down": nn.Linear(3, 8), "unused": nn.Linear(2, 2)}
    deltas = [delta_of(layer, torch.ones(layer.weight.shape), 5, f"{name}.weight") for name, layer in layers.items()]
    tensors = {}
    for delta in deltas[:2]:
        adjusted = delta.adjusted(delta.delta()).tensors
        tensors |= {name: tensor.contiguous() for name, tensor in adjusted.items()}
    settings = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "somewhere"}
    write_lora(tmp_path / "out", deltas, settings, tensors, by_hand.report())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"down": 3}
    assert sorted(config["target_modules"]) == ["down", "up"] and not config["fan_in_fan_out"]
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "somewhere")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
