"""Which adapters a model computes with is read off the model, whichever library put them there."""

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from safedelta_hf.modules.adapters import active_adapters
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
