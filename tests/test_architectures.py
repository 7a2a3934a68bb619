"""Every causal language model of transformers, from a tiny configuration: build, read, perturb, adjust."""

import copy
import math

import pytest
import torch

from safedelta_hf import SafeDelta, Treatment, adjust_model, collect_profile
from safedelta_hf.capture.observer import every_product_visible
from tests.fixtures import architectures, tiny

REPRESENTATIVE = {
    "bloom", "deepseek_v3", "falcon_mamba", "gemma2", "gpt2", "gpt_oss", "jamba", "lfm2", "llama", "llama4_text",
    "mamba2", "mixtral", "mpt", "opt", "phi3", "qwen3_5_moe_text", "qwen3_next", "recurrent_gemma", "rwkv", "zamba2",
}  # fmt: skip
ROWS = tiny.rows(6, seed=1)
OTHERS = Treatment(uncovered="keep")


KEYS = [pytest.param(key, marks=() if key in REPRESENTATIVE else pytest.mark.slow) for key in architectures.KEYS]


def state_of(model):
    modules = {name: (set(vars(module)), module.training, hooks(module)) for name, module in model.named_modules()}
    return copy.deepcopy((model.config.to_dict(), modules)), implementations(model)


def hooks(module):
    return len(module._forward_hooks), len(module._forward_pre_hooks)


def implementations(model):
    return model.get_experts_implementation() if model._can_set_experts_implementation() else None


def adjusted(base, profile, rule):
    tuned = tiny.perturbed(copy.deepcopy(base))
    before = tiny.weights(tuned)
    report = adjust_model(tuned, base=base, profile=profile, rule=rule, treatment=OTHERS, progress=False)
    return before, tiny.weights(tuned), report


def may_keep_entries(uses, shape):
    """Whether the safety data leaves some entries of a parameter alone: rows, entries or parts that it never used."""
    return not any(not use.role.is_diagonal and use.view.covers(math.prod(shape)) for use in uses)


@pytest.mark.parametrize("key", KEYS)
def test_an_architecture_is_covered(key):
    if key in architectures.NOT_BUILT:
        pytest.skip(architectures.NOT_BUILT[key])
    base = architectures.tiny_model(key)
    with torch.no_grad():
        base(
            input_ids=torch.tensor([ROWS[0]["input_ids"]]), use_cache=False
        )  # some settle on an implementation at their first call
    weights, state = tiny.weights(base), state_of(base)
    profile = collect_profile(base, ROWS, progress=False)
    assert state_of(base) == state and tiny.same(tiny.weights(base), weights)
    assert architectures.coverage(base, profile).read >= 0.95

    tuned, unlimited, report = adjusted(base, profile, SafeDelta(strength=math.inf, exclude_top=0.0))
    assert tiny.same(unlimited, tuned)
    assert sorted(record.parameter for record in report.parameters) == sorted(weights)
    assert all(record.reason for record in report.parameters if record.outcome == "kept")

    tuned, nothing, report = adjusted(base, profile, SafeDelta(strength=0.0))
    uses = {}
    for use in profile.uses:
        uses.setdefault(use.parameter, []).append(use)
    for name, value in nothing.items():
        if name not in uses:
            assert torch.equal(value, tuned[name]), name
        elif may_keep_entries(uses[name], value.shape):
            assert ((value == weights[name]) | (value == tuned[name])).all(), name
        else:
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("key", ["mixtral", "gpt_oss", "llama4_text", "jetmoe"])
def test_the_plain_way_to_compute_gives_the_same_logits(key):
    model = architectures.tiny_model(key)
    inputs = {"input_ids": torch.tensor([row["input_ids"][:4] for row in ROWS]), "use_cache": False}
    with torch.no_grad():
        expected = model(**inputs).logits
        with every_product_visible(model):
            found = model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
