"""What docs/compatible.md says of other ways to compute: the adjusted model is the same."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from safedelta_hf import Ridge, SafeDeltaCallback
from tests.fixtures import tiny

WAYS = {
    "gradient checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant gradient checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "torch.compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


def adjusted(folder, rows, with_lora, **changes):
    model = tiny.llama()
    if with_lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    callback = SafeDeltaCallback(rows, rule=Ridge(strength=1.0))
    trainer = tiny.trainer(model, callback, folder, **changes)
    trainer.train()
    assert set(callback.report.outcomes) == {"adjusted"}
    return tiny.weights(trainer.model)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
@pytest.mark.parametrize("with_lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("way", WAYS)
def test_another_way_to_compute_the_training_ends_with_the_same_adjusted_model(way, with_lora, tmp_path, safety_rows):
    plain = adjusted(tmp_path / "plain", safety_rows, with_lora)
    found = adjusted(tmp_path / "other", safety_rows, with_lora, **WAYS[way])
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
