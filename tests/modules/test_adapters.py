"""Which adapters a model computes with is read off the model, whichever library put them there."""

import pytest
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.modules.adapters import active_adapters, trained_adapter
from tests.fixtures import adapters, tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny.llama().save_pretrained(folder / "base")
    adapters.adapted(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "adapter")
    return folder / "adapter"


def injected():
    model = tiny.llama()
    adapters.inject(model, "mine")
    return model


def test_the_active_adapters_of_every_library_are_named(saved):
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    wrapped = get_peft_model(tiny.llama(), adapters.config())
    wrapped.add_adapter("other", adapters.config(r=2))
    assert [active_adapters(model) for model in (tiny.llama(), injected(), loaded, wrapped)] == [
        [],
        ["mine"],
        ["default"],
        ["default"],
    ]
    wrapped.base_model.set_adapter(["other", "default"])
    assert active_adapters(wrapped) == ["other", "default"]


def test_a_model_without_adapters_trains_none():
    assert trained_adapter(nn.Linear(2, 2), "It") is None


@pytest.mark.parametrize("names", [[], ["one"], ["one", "two"]])
def test_of_several_adapters_one_has_to_be_chosen(names):
    model = nn.Linear(2, 2)
    model.peft_config, model.active_adapters = {"one": None, "two": None}, names
    if len(names) == 1:
        assert trained_adapter(model, "It") == "one"
        return
    with pytest.raises(ConfigurationError, match=rf"^It: .*{len(names)} are active: .*set_adapter\(name\)"):
        trained_adapter(model, "It")
