"""Adjust the adapter, merge it; merge first, adjust the dense delta: the same weights."""

import copy

import pytest
import torch
from peft import PeftModel

from safedelta_hf import Ridge, SafeDelta, Treatment, adjust_adapter, adjust_model, plan_adapter
from safedelta_hf.deltas.lora_layers import lora_deltas
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import AdapterError, NumericalError, ProfileError
from tests.fixtures import adapters, oracles, tiny

RULE = SafeDelta(strength=100.0)
VARIANTS = {
    "linear": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"up_proj": 9}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "lora_bias": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_bias": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "tokens": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 9, 40]}}),
    "tied tokens": ("tied", {"trainable_token_indices": {"embed_tokens": [3, 9, 40]}}),
    "dropout": ("llama", {"lora_dropout": 0.3}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "mica": ("llama", {"init_lora_weights": "mica"}),
}
BASES = {"llama": tiny.llama, "gpt2": tiny.gpt2, "tied": lambda: tiny.llama(tied=True)}


@pytest.fixture(scope="module")
def profiles():
    return {name: adapters.profile_of(make()) for name, make in BASES.items()}


def adjusted(model, profile, **settings):
    return adjust_adapter(model, profile=profile, rule=settings.pop("rule", RULE), progress=False, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compensation", ["joint", "sequential"])
def test_adjusting_then_merging_is_merging_then_adjusting(variant, compensation, profiles):
    kind, changes = VARIANTS[variant]
    base, profile, rule = BASES[kind](), profiles[kind], SafeDelta(strength=100.0, compensation=compensation)
    model = adapters.adapted(base, **changes)
    expected = adapters.merged(model)
    dense = adjust_model(expected, base=base, profile=profile, rule=rule, progress=False)
    report = adjusted(model, profile, rule=rule)
    adapters.assert_close_weights(adapters.merged(model), expected)
    whole = {record.parameter: record for record in dense.parameters}
    assert {record.parameter for record in report.parameters} == {
        name for name, record in whole.items() if record.outcome != "unchanged"
    }
    kept_something = False
    for record in report.parameters:
        other = whole[record.parameter]
        assert record.outcome == "adjusted"
        assert record.delta_energy == pytest.approx(other.delta_energy, rel=1e-3)
        assert record.lost_energy == pytest.approx(other.lost_energy, rel=1e-3, abs=1e-4)
        assert record.tuned_loss == pytest.approx(other.tuned_loss, rel=1e-3)
        assert record.adjusted_loss == pytest.approx(other.adjusted_loss, rel=2e-2, abs=1e-6)
        kept_something |= 0.01 < record.lost_energy / record.delta_energy < 0.99
    assert kept_something, "a rule that keeps all or nothing would make this test empty"


def test_the_adapter_keeps_its_names_shapes_types_and_configuration_and_its_base(profiles):
    model = adapters.adapted(tiny.llama())
    before, settings = adapters.own_tensors(model), copy.deepcopy(model.peft_config["default"].to_dict())
    frozen = tiny.weights(model.get_base_model())
    adjusted(model, profiles["llama"])
    after = adapters.own_tensors(model)
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    assert model.peft_config["default"].to_dict() == settings
    for name, weight in tiny.weights(model.get_base_model()).items():
        assert "lora_A" in name or torch.equal(weight, frozen[name]), name


def test_a_new_adapter_stands_beside_the_untouched_one(profiles):
    model = adapters.adapted(tiny.llama(), modules_to_save=["lm_head"])
    before = adapters.own_tensors(model)
    beside = copy.deepcopy(model)
    report = adjusted(beside, profiles["llama"], new_adapter_name="safe")
    assert tiny.same(adapters.own_tensors(beside), before)
    assert beside.active_adapter == "default"
    in_place = adjusted(model, profiles["llama"])
    assert tiny.same(adapters.own_tensors(beside, "safe"), adapters.own_tensors(model))
    assert report.parameters == in_place.parameters
    assert beside.peft_config["safe"].to_dict() == model.peft_config["default"].to_dict()
    beside.set_adapter("safe")
    ids = torch.arange(3, 11)[None]
    torch.testing.assert_close(beside.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_only_the_named_adapter_is_touched(profiles):
    model = adapters.adapted(tiny.llama())
    model.add_adapter("other", adapters.config(r=2))
    model.set_adapter("other")
    adapters.trained(model, seed=8)
    before = adapters.own_tensors(model, "default")
    adjusted(model, profiles["llama"], adapter_name="other")
    assert tiny.same(adapters.own_tensors(model, "default"), before)
    assert model.active_adapter == "other"


def in_bfloat16_and_float32():
    """One adapter, held in either type; all of its values fit into the coarser."""
    exact = adapters.adapted(tiny.llama())
    model = copy.deepcopy(exact)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
            exact.get_parameter(name).data = parameter.data.float()
    return model, exact


def test_the_report_of_a_half_precision_adapter_is_that_of_what_it_holds(profiles):
    model, exact = in_bfloat16_and_float32()

    def deltas():
        return {own.parameter: own.delta().values for own in lora_deltas(open_model(model), "default")}

    before = deltas()
    report = adjusted(model, profiles["llama"])
    assert all(tensor.dtype == torch.bfloat16 for tensor in adapters.own_tensors(model).values())
    after = deltas()
    hessians = {use.parameter: profiles["llama"].moments[use.moment].total * (2 / 24) for use in profiles["llama"].uses}
    for record in report.parameters:
        name = record.parameter
        assert record.adjusted_loss == pytest.approx(oracles.loss(after[name], hessians[name]), rel=1e-4)
        assert record.tuned_loss == pytest.approx(oracles.loss(before[name], hessians[name]), rel=1e-4)
        lost = (before[name].double() - after[name].double()).square().sum()
        assert record.lost_energy == pytest.approx(float(lost), rel=1e-4)
        assert "rounded to" in record.notes[-1] and record.unrounded_loss != record.adjusted_loss
    assert not any(record.notes for record in adjusted(exact, profiles["llama"]).parameters)


def test_factors_are_rounded_to_the_nearest_unless_that_costs_safety(profiles):
    model, exact = in_bfloat16_and_float32()
    # At the first a share of it is kept in every direction, at the second next to nothing where the data point.
    for strength, fed in ((1e-3, False), (1e5, True)):
        one, other = copy.deepcopy(model), copy.deepcopy(exact)
        records = adjusted(one, profiles["llama"], rule=Ridge(strength=strength)).parameters
        assert any("errors fed on" in record.notes[-1] for record in records) == fed
        adjusted(other, profiles["llama"], rule=Ridge(strength=strength))
        wanted = adapters.own_tensors(other)
        nearest = {name: torch.equal(held, wanted[name].bfloat16()) for name, held in adapters.own_tensors(one).items()}
        assert all(nearest.values()) == (not fed)


def test_treatment_resets_and_keeps_what_it_says(profiles):
    from safedelta_hf import Treatment

    base = tiny.llama()
    model = adapters.adapted(base, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head", "norm"])
    tuned = tiny.weights(adapters.merged(model))
    treatment = Treatment(embeddings="reset", head="keep", norms="reset")
    outcomes = {r.parameter: r.outcome for r in adjusted(model, profiles["llama"], treatment=treatment).parameters}
    found, start = tiny.weights(adapters.merged(model)), tiny.weights(base)
    assert outcomes["model.embed_tokens.weight"] == outcomes["model.norm.weight"] == "reset"
    assert torch.equal(found["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], start["model.norm.weight"])
    assert outcomes["lm_head.weight"] == "kept"
    assert torch.equal(found["lm_head.weight"], tuned["lm_head.weight"])


def test_biases_trained_in_the_base_itself_need_that_base(profiles):
    base = tiny.gpt2()
    model = adapters.adapted(base, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    stopped(model, profiles["gpt2"], AdapterError, r"bias='all'.*pass base=")
    expected = adapters.merged(model)
    adjust_model(expected, base=base, profile=profiles["gpt2"], rule=RULE, progress=False)
    report = adjusted(model, profiles["gpt2"], base=base)
    assert sum(record.roles == ("bias",) for record in report.parameters) > 10
    adapters.assert_close_weights(adapters.merged(model), expected)


def stopped(model, profile, error, match, **settings):
    before = tiny.weights(model)
    with pytest.raises(error, match=match):
        adjusted(model, profile, **settings)
    assert tiny.same(tiny.weights(model), before)


def test_a_profile_of_another_base_is_refused(profiles):
    other = tiny.perturbed(tiny.llama())
    stopped(adapters.adapted(other), profiles["llama"], ProfileError, "another base: .* differs below the adapter")
    stopped(adapters.adapted(tiny.llama()), profiles["gpt2"], ProfileError, "another base")


def test_a_merged_adapter_is_refused(profiles):
    model = adapters.adapted(tiny.llama())
    model.merge_adapter()
    stopped(model, profiles["llama"], AdapterError, "merged into the base.*unmerge_adapter")


def test_an_unknown_or_taken_name_is_refused(profiles):
    model = adapters.adapted(tiny.llama())
    stopped(model, profiles["llama"], AdapterError, "it has \\['default'\\]", adapter_name="none")
    stopped(model, profiles["llama"], AdapterError, "choose another", new_adapter_name="default")


TWICE = {
    "LoRA": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens and LoRA": {"target_modules": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3, 9]}},
    "other tokens": {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [4, 9]}},
    "LoRA and whole": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("settings", TWICE.values(), ids=TWICE)
def test_a_tied_weight_that_is_tuned_in_two_places_is_refused_before_and_after_training(settings, profiles):
    model = adapters.adapted(tiny.llama(tied=True), **copy.deepcopy(settings))
    told = r"embed_tokens\.weight: the adapter tunes it in two places, by base_model.*ensure_weight_tying=True"
    stopped(model, profiles["tied"], AdapterError, told)
    with pytest.raises(AdapterError, match=told):
        plan_adapter(model, profiles["tied"], Treatment())


def test_tokens_on_top_of_a_copy_of_all_of_them_are_refused(profiles):
    settings = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3, 9]}}
    model = adapters.adapted(tiny.llama(tied=True), **settings)
    stopped(model, profiles["tied"], AdapterError, "trainable_token_indices.*on top of a copy.*choose one of the two")


def test_what_is_advised_for_a_tied_weight_works(profiles, tmp_path):
    def both():  # PEFT changes the list that it is given
        return {"modules_to_save": ["embed_tokens", "lm_head"]}

    # PEFT before 0.20 does not tie what is named itself.
    together = adapters.adapted(tiny.llama(tied=True), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert adjusted(together, profiles["tied"]).outcomes["adjusted"] == 15
    adapters.adapted(tiny.llama(tied=True), **both()).save_pretrained(tmp_path)
    base = tiny.llama(tied=True)
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    profile = adapters.profile_of(base)
    model = PeftModel.from_pretrained(base, tmp_path)
    report = adjusted(model, profile)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {record.parameter for record in report.parameters}
    assert report.outcomes["adjusted"] == 16


def test_nan_is_refused_by_name_and_leaves_no_new_adapter(profiles):
    model = adapters.adapted(tiny.llama())
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"layers.1.mlp.up_proj.lora_B.default.weight: .*NaN"):
        adjusted(model, profiles["llama"])
    with pytest.raises(NumericalError):
        adjusted(model, profiles["llama"], new_adapter_name="safe")
    assert list(model.peft_config) == ["default"]


def test_a_failure_half_way_puts_the_whole_adapter_back(profiles, monkeypatch):
    model = adapters.adapted(tiny.llama())
    calls = []

    def failing(self, state, delta):
        calls.append(delta)
        if len(calls) == 9:
            raise NumericalError("on purpose")
        return original(self, state, delta)

    original = SafeDelta.transform
    monkeypatch.setattr(SafeDelta, "transform", failing)
    stopped(model, profiles["llama"], NumericalError, "on purpose")
    assert len(calls) == 9


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"init_lora_weights": "pissa"}, "initial_adapter"),
        ({"init_lora_weights": "olora"}, "initial_adapter"),
        ({"use_dora": True}, "refactor_adapter"),
        ({"alora_invocation_tokens": [3, 4]}, "some tokens only"),
        ({"lora_bias": True}, r"q_proj.weight: the adapter \(lora_bias=True\) adds a bias"),
    ],
)
def test_what_is_not_linear_in_its_factors_is_refused_by_name(changes, match, profiles):
    stopped(adapters.adapted(tiny.llama(), **changes), profiles["llama"], AdapterError, match)
