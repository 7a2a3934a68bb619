import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.modules.names import bare, canonical, embeddings, parameter_aliases, parameter_names, without_wrappers
from tests.fixtures import tiny


@pytest.mark.parametrize(
    "wrapped",
    [
        "model.layers.0.mlp.up_proj.weight",
        "_orig_mod.model.layers.0.mlp.up_proj.weight",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight",
        "model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
    ],
)
def test_wrappers_do_not_change_a_name(wrapped):
    assert canonical(wrapped) == "model.layers.0.mlp.up_proj.weight"


def test_a_tied_parameter_has_one_name_and_its_aliases():
    model = tiny.llama(tied=True)
    names = parameter_names(model)
    assert names[model.lm_head.weight] == "model.embed_tokens.weight"
    assert parameter_aliases(model)["model.embed_tokens.weight"] == ("lm_head.weight",)
    assert parameter_aliases(tiny.llama())["model.embed_tokens.weight"] == ()


def test_embeddings_are_those_that_a_model_names_without_what_wraps_them():
    model = tiny.llama()
    for side, layer in (("input", model.model.embed_tokens), ("output", model.lm_head)):
        assert embeddings(model, side) is layer
    layer = model.model.embed_tokens
    model.model.embed_tokens = nn.ModuleDict({"base_layer": layer})
    model.model.embed_tokens.adapter_layer_names = ("lora_embedding_A",)  # as PEFT wraps a layer
    assert embeddings(model, "input") is layer
    assert embeddings(nn.Linear(2, 2), "input") is None

    class WithoutText(nn.Module):
        def get_output_embeddings(self):
            raise NotImplementedError

    assert embeddings(WithoutText(), "output") is None


def test_a_compiled_model_has_the_names_of_the_bare_one():
    model = tiny.llama()
    compiled = torch.compile(model, backend="eager")
    assert parameter_names(compiled) == parameter_names(model)


def test_wrappers_are_gone_within_the_block_and_back_however_it_ends():
    plain = [name for name, _ in tiny.llama().named_modules()]
    model = tiny.llama()
    model.model.layers[0] = checkpoint_wrapper(torch.compile(model.model.layers[0], backend="eager"))
    model = torch.compile(model, backend="eager")
    wrapped = dict(model.named_modules())
    with pytest.raises(ZeroDivisionError), without_wrappers(model) as bare:
        assert [name for name, _ in bare.named_modules()] == plain
        raise ZeroDivisionError
    assert dict(model.named_modules()) == wrapped


def test_a_compiled_model_is_the_one_that_was_compiled():
    model = nn.Linear(2, 2)
    assert bare(torch.compile(model), "It") is model is bare(model, "It")
    with pytest.raises(ConfigurationError, match="^It: the Trainer passed no model"):
        bare(None, "It")
