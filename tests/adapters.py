"""Tiny models with adapters on them, and what an adapter means once it is merged."""

import copy

import torch
from peft import LoraConfig, get_peft_model

from safedelta_hf import collect_profile
from tests import tiny

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def profile_of(model):
    return collect_profile(model, tiny.rows(24, seed=1), holdout=0.0, progress=False)


def config(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | changes)


def adapted(base, scale: float = 0.1, seed: int = 7, **changes):
    """A copy of a base with a LoRA on it, as training would leave it."""
    return trained(get_peft_model(copy.deepcopy(base), config(**changes)), scale, seed)


def trained(model, scale: float = 0.1, seed: int = 7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.dtype))
    return model


def merged(model, adapter: str = "default"):
    """The plain model that a copy of the adapted one becomes, in float32."""
    model = copy.deepcopy(model)
    model.set_adapter(adapter)
    return model.merge_and_unload()


def own_tensors(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_close_weights(found, expected, tolerance: float = 2e-5):
    found, expected = tiny.weights(found), tiny.weights(expected)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        scale = max(float(weight.norm()), 1e-6)
        assert float((found[name] - weight).norm()) <= tolerance * scale, name
