"""Every architecture of transformers has its decoder layers found, or is refused by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from safedelta_hf.errors import ArchitectureError
from safedelta_hf.modules.decoder_layers import decoder_layers
from tests.fixtures import architectures, tiny

SEVERAL = {"blt": "local_encoder", "hrm_text": "L_module"}
NONE = {"xlm"}
FOUND = [key for key in architectures.KEYS if key not in {*architectures.NOT_BUILT, *SEVERAL, *NONE}]
PER_LAYER = {"longcat_flash": 2}
"""Layers that the configuration counts for one in the list."""


def on_meta(make):
    with torch.device("meta"):
        return make()


def whole(key, auto):
    kind = CONFIG_MAPPING[key]
    return on_meta(lambda: auto.from_config(kind(**architectures.shrunk(kind()))))


@pytest.mark.parametrize("key", FOUND)
def test_the_layers_of_a_causal_language_model_are_those_that_its_configuration_counts(key):
    model = on_meta(lambda: architectures.tiny_model(key))
    layers = decoder_layers(model)
    assert len(layers) * PER_LAYER.get(key, 1) == model.config.get_text_config(decoder=True).num_hidden_layers
    modules = dict(model.named_modules())
    assert all(modules[name] is layer for name, layer in layers)
    towers = ("vision", "visual", "image", "audio")
    assert not any(tower in name for tower in towers for name, _ in layers)


@pytest.mark.parametrize(
    "key, auto, place",
    [
        ("llava", AutoModelForImageTextToText, "model.language_model.layers.0"),
        ("qwen2_vl", AutoModelForImageTextToText, "model.language_model.layers.0"),
        ("idefics", AutoModelForImageTextToText, "model.layers.0"),
        ("idefics3", AutoModelForImageTextToText, "model.text_model.layers.0"),
        ("blip-2", AutoModelForImageTextToText, "language_model.model.decoder.layers.0"),
        ("mllama", AutoModelForImageTextToText, "model.language_model.layers.0"),
        ("llama4", AutoModelForImageTextToText, "language_model.model.layers.0"),
        ("t5", AutoModelForSeq2SeqLM, "decoder.block.0"),
        ("bart", AutoModelForSeq2SeqLM, "model.decoder.layers.0"),
    ],
)
def test_of_a_model_of_several_parts_the_layers_of_the_language_decoder_are_found(key, auto, place):
    layers = decoder_layers(whole(key, auto))
    assert [name for name, _ in layers] == [place, f"{place[:-1]}1"]


@pytest.mark.parametrize("key", SEVERAL)
def test_where_several_lists_could_be_meant_all_are_named(key):
    with pytest.raises(ArchitectureError, match=f"several lists.*{SEVERAL[key]}"):
        decoder_layers(on_meta(lambda: architectures.tiny_model(key)))


@pytest.mark.parametrize("make", [lambda: architectures.tiny_model("xlm"), tiny.Plain], ids=["xlm", "plain"])
def test_a_model_without_a_list_is_refused(make):
    with pytest.raises(ArchitectureError, match="no list of decoder layers"):
        decoder_layers(on_meta(make))


def test_a_model_of_ones_own_needs_a_list_by_one_of_the_names():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    assert [name for name, _ in decoder_layers(model)] == ["blocks.0", "blocks.1"]


def checkpointed(model):
    for key, layer in model.model.layers.named_children():
        model.model.layers[int(key)] = checkpoint_wrapper(layer)
    return model


def compiled_layers(model):
    for key, layer in model.model.layers.named_children():
        model.model.layers[int(key)] = torch.compile(layer, backend="eager")
    return model


LORA = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["embed_tokens"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: get_peft_model(model, LORA),
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(get_peft_model(model, LORA), backend="eager"),
        checkpointed,
        compiled_layers,
    ],
    ids=["peft", "compiled", "compiled peft", "checkpointed", "compiled layers"],
)
def test_wrappers_change_neither_name_nor_module(wrap):
    model = tiny.llama()
    bare = decoder_layers(model)
    assert decoder_layers(wrap(model)) == bare


def test_data_parallelism_changes_neither_name_nor_module(tmp_path):
    model = tiny.llama()
    bare = decoder_layers(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert decoder_layers(nn.parallel.DistributedDataParallel(model)) == bare
    finally:
        torch.distributed.destroy_process_group()
