import pytest
import torch

from safedelta_hf.modules.names import canonical, parameter_aliases, parameter_names
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


def test_a_compiled_model_has_the_names_of_the_bare_one():
    model = tiny.llama()
    compiled = torch.compile(model, backend="eager")
    assert parameter_names(compiled) == parameter_names(model)
