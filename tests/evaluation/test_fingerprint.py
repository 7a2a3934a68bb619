import pytest
import torch

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.evaluation import model_digest
from tests.fixtures import tiny


def adapted(**settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(
        tiny.llama(), LoraConfig(**{"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8} | settings)
    )


def test_equal_models_are_equal_wherever_they_are(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    used = tiny.llama().train()
    used.config.use_cache = False
    assert model_digest(tiny.llama(), None) == model_digest(tiny.loaded(tmp_path), None) == model_digest(used, None)


@pytest.mark.parametrize("change", ["weight", "dtype", "configuration", "tokenizer"])
def test_what_changes_the_responses_changes_the_digest(change):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    before = model_digest(model, tokenizer)
    if change == "weight":
        model.lm_head.weight.data[0, 0] += 1e-3
    elif change == "dtype":
        model = model.bfloat16()
    elif change == "configuration":
        model.config.rope_parameters["rope_theta"] = 5.0
    else:
        tokenizer.chat_template += " "
    assert model_digest(model, tokenizer) != before


def test_adapters_count_with_their_scaling_and_whether_they_are_on():
    digests = [model_digest(model, None) for model in (tiny.llama(), adapted(), adapted(lora_alpha=16))]
    two = adapted()
    two.add_adapter("other", two.peft_config["default"])
    digests.append(model_digest(two, None))
    two.set_adapter("other")
    digests.append(model_digest(two, None))
    assert len(set(digests)) == len(digests)


def test_a_saved_adapter_is_the_same_when_it_is_loaded(tmp_path):
    from peft import PeftModel

    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert model_digest(loaded, None) == model_digest(again, None)


def test_offloaded_weights_are_refused():
    with pytest.raises(ConfigurationError, match="weights are offloaded"):
        model_digest(tiny.llama().to("meta"), None)
