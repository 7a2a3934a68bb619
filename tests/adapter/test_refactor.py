"""Adapters that are no product of two factors: their adjusted delta as a LoRA, and what its rank leaves out."""

import copy
import re

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

from safedelta_hf import adjust_adapter, adjust_model, refactor_adapter
from safedelta_hf.errors import AdapterError, ProfileError
from tests.adapter.test_adjust import RULE
from tests.fixtures import adapters, tiny

FULL = 16  # the smaller side of every layer of the tiny model, so nothing is left out
TARGETS = {"target_modules": adapters.LINEAR, "task_type": "CAUSAL_LM"}
TUNERS = {
    "DoRA": lambda: adapters.config(use_dora=True),
    "DoRA and a whole head": lambda: adapters.config(use_dora=True, modules_to_save=["lm_head"]),
    "BD-LoRA": lambda: adapters.config(
        use_bdlora=peft.tuners.lora.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=[], nblocks=2),
        target_modules=["q_proj"],
    ),
    "LoHa": lambda: peft.LoHaConfig(r=4, **TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=4, **TARGETS),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=50, scaling=5.0, **TARGETS),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, **TARGETS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **TARGETS),
    "HRA": lambda: peft.HRAConfig(r=2, **TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module")
def profile():
    return adapters.profile_of(tiny.llama())


def tuned(name):
    if name == "BD-LoRA":
        adapters.require(peft.tuners.lora, "BdLoraConfig")
    torch.manual_seed(4)
    return adapters.trained(get_peft_model(tiny.llama(), TUNERS[name]()))


def refactored(model, profile, output, rank=FULL, **settings):
    return refactor_adapter(model, output=output, rank=rank, profile=profile, rule=RULE, progress=False, **settings)


@pytest.mark.parametrize("tuner", TUNERS)
def test_at_full_rank_it_is_merging_then_adjusting(tuner, profile, tmp_path):
    model = tuned(tuner)
    before = tiny.weights(model)
    expected = adapters.merged(model)
    dense = adjust_model(expected, base=tiny.llama(), profile=profile, rule=RULE, progress=False)
    report = refactored(model, profile, tmp_path / "out")
    assert tiny.same(tiny.weights(model), before)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
    adapters.assert_close_weights(loaded.merge_and_unload(), expected, tolerance=1e-4)
    changed = {record.parameter for record in dense.parameters if record.outcome == "adjusted"}
    assert {record.parameter for record in report.parameters} == changed
    assert all(record.outcome == "adjusted" for record in report.parameters)


def test_the_report_states_what_the_rank_leaves_out(profile, tmp_path):
    model = tuned("DoRA")
    exact, cut = adapters.merged(model), tiny.llama()
    adjust_model(exact, base=tiny.llama(), profile=profile, rule=RULE, progress=False)
    report = refactored(model, profile, tmp_path / "out", rank=3)
    loaded = PeftModel.from_pretrained(cut, tmp_path / "out")
    assert loaded.peft_config["default"].r == 3
    found, wanted, base = tiny.weights(loaded.merge_and_unload()), tiny.weights(exact), tiny.weights(tiny.llama())
    for record in report.parameters:
        delta = (wanted[record.parameter] - base[record.parameter]).double()
        values = torch.linalg.svdvals(delta)
        share = float(values[3:].norm() / values.norm())
        stated = re.fullmatch(r"rank 3 leaves out (.*)% of the norm of the adjusted delta", record.notes[-1])
        assert float(stated.group(1)) == pytest.approx(100 * share, abs=0.02)
        left_out = (found[record.parameter] - wanted[record.parameter]).norm() / delta.norm()
        assert float(left_out) == pytest.approx(share, abs=1e-3)


def test_conv1d_layers_and_embeddings_are_written_in_their_own_layout(tmp_path):
    base = tiny.gpt2()
    profile = adapters.profile_of(base)
    settings = adapters.config(use_dora=True, target_modules=["c_attn", "c_fc", "wte"], fan_in_fan_out=True)
    model = adapters.trained(get_peft_model(copy.deepcopy(base), settings))
    expected = adapters.merged(model)
    adjust_model(expected, base=base, profile=profile, rule=RULE, progress=False)
    refactored(model, profile, tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "out")
    adapters.assert_close_weights(loaded.merge_and_unload(), expected, tolerance=1e-4)


def test_kept_and_reset_parameters_are_written_as_such(profile, tmp_path):
    from safedelta_hf import Treatment

    torch.manual_seed(4)
    config = adapters.config(use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    model = adapters.trained(get_peft_model(tiny.llama(), config))
    expected = tiny.weights(adapters.merged(model))
    treatment = Treatment(head="keep", norms="reset")
    refactored(model, profile, tmp_path / "out", treatment=treatment)
    found = tiny.weights(PeftModel.from_pretrained(tiny.llama(), tmp_path / "out").merge_and_unload())
    assert torch.equal(found["lm_head.weight"], expected["lm_head.weight"])
    assert torch.equal(found["model.norm.weight"], tiny.llama().model.norm.weight)


@pytest.mark.parametrize("tuner", ["LoHa", "IA3", "AdaLoRA", "DoRA", "BD-LoRA"])
def test_adjust_adapter_points_here(tuner, profile):
    with pytest.raises(AdapterError, match="refactor_adapter"):
        adjust_adapter(tuned(tuner), profile=profile, rule=RULE, progress=False)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
)
def test_what_changes_no_weight_is_refused(config, profile, tmp_path):
    model = get_peft_model(tiny.llama(), config)
    with pytest.raises(AdapterError, match="changes no weight"):
        refactored(model, profile, tmp_path / "out")
    with pytest.raises(AdapterError, match="does not add a product"):
        adjust_adapter(model, profile=profile, progress=False)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"alora_invocation_tokens": [3, 4]}, "some tokens only"),
        ({"bias": "all"}, "trains biases of the base"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "cannot be written as a LoRA"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "LoftQ replaced the base"),
    ],
)
def test_what_no_lora_can_hold_is_refused(changes, match, profile, tmp_path):
    if changes.get("init_lora_weights") == "loftq":
        model = adapters.adapted(tiny.llama())
        model.peft_config["default"].init_lora_weights = "loftq"
    else:
        model = adapters.adapted(tiny.llama(), **changes)
    with pytest.raises(AdapterError, match=match):
        refactored(model, profile, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_a_used_output_and_no_rank_are_refused(profile, tmp_path):
    model = tuned("DoRA")
    with pytest.raises(AdapterError, match="at least 1"):
        refactored(model, profile, tmp_path / "out", rank=0)
    with pytest.raises(AdapterError, match="exists already"):
        refactored(model, profile, tmp_path)
    other = adapters.trained(get_peft_model(tiny.perturbed(tiny.llama()), TUNERS["DoRA"]()))
    with pytest.raises(ProfileError, match="another base"):
        refactored(other, profile, tmp_path / "out")
    assert not list(tmp_path.iterdir())
