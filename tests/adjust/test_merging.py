"""Merges of whole models: in memory, with further models wherever they are kept, and never on an adapter's factors."""

import json

import pytest
import torch
from peft import get_peft_model

from safedelta_hf import (
    AutoStrength,
    Dare,
    ModelStock,
    ProfileConfig,
    SafeMerge,
    Slerp,
    Ties,
    Treatment,
    adjust_adapter,
    adjust_adapter_files,
    adjust_model,
    collect_profile,
    refactor_adapter,
)
from safedelta_hf.data.refusals import Drift
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import AdapterError
from tests.fixtures import adapters, tiny
from tests.fixtures import merging as oracles
from tests.model.test_adjust import WithMixture

MODELS = {"llama": tiny.llama, "tied llama": lambda: tiny.llama(tied=True), "gpt2": tiny.gpt2}


@pytest.fixture(scope="module")
def profiles():
    return {name: adapters.profile_of(make()) for name, make in MODELS.items()}


@pytest.fixture
def profile(profiles):
    return profiles["llama"]


def merge(rule, profile, tuned=None, base=None, **settings):
    """Adjust a fine-tuned llama, or what is given; returns its weights and the report."""
    tuned = tiny.perturbed(tiny.llama()) if tuned is None else tuned
    report = adjust_model(tuned, base=base or tiny.llama(), profile=profile, rule=rule, progress=False, **settings)
    return tiny.weights(tuned), report


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_ends_where_the_oracle_says(kind, profiles):
    base, tuned = MODELS[kind](), tiny.perturbed(MODELS[kind](), scale=0.1)
    before = tiny.weights(tuned)
    found, report = merge(Ties(strength=1.0), profiles[kind], tuned, base)
    for name, weight in tiny.weights(base).items():
        expected = weight + oracles.ties([before[name] - weight], 0.5)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert set(report.outcomes) == {"adjusted"}


def test_slerp_turns_every_weight_as_the_oracle_says(profile):
    tuned = tiny.perturbed(tiny.llama(), scale=0.1)
    before = tiny.weights(tuned)
    found, _ = merge(Slerp(strength=0.5), profile, tuned)
    for name, weight in tiny.weights(tiny.llama()).items():
        torch.testing.assert_close(
            found[name].double(), oracles.slerp(weight, before[name], 1 / 1.5), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("rule", [Slerp(strength=0.0), Dare(strength=0.0), Ties(strength=0.0)], ids=lambda r: r.name)
def test_strength_zero_leaves_every_bit_as_tuned(rule, profile):
    expected = tiny.weights(tiny.perturbed(tiny.llama().bfloat16()))
    base = tiny.llama().bfloat16()
    found, _ = merge(rule, adapters.profile_of(base), tiny.perturbed(tiny.llama().bfloat16()), base)
    assert tiny.same(found, expected)


def test_a_share_of_nothing_is_the_base_bit_for_bit_but_for_the_largest_entry_of_each_parameter(profile):
    tuned = tiny.weights(tiny.perturbed(tiny.llama()))
    found, _ = merge(Ties(strength=1e9), profile)
    for name, weight in tiny.weights(tiny.llama()).items():
        largest = int((tuned[name] - weight).abs().argmax())
        assert (found[name] != weight).flatten().nonzero().tolist() == [[largest]]


def test_the_report_measures_the_merge_by_the_safety_moments_and_is_plain(profile):
    other = tiny.perturbed(tiny.llama(), seed=8)
    _, report = merge(ModelStock(strength=1.0, others=[other]), profile)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["rule"]["settings"]["others"] == ["a LlamaForCausalLM in memory"]
    for record in report.parameters:
        assert record.adjusted_loss < record.tuned_loss
        assert "mean cosine of 2 deltas" in record.notes[0]


def test_safe_merge_merges_exactly_the_layers_whose_cosine_is_below_the_threshold(profile):
    base, unaligned, safe = tiny.llama(), tiny.perturbed(tiny.llama(), seed=3), tiny.perturbed(tiny.llama(), seed=4)
    tuned = tiny.perturbed(tiny.llama())
    before, weights = tiny.weights(tuned), tiny.weights(base)
    cosines = {
        name: oracles.alignment_cosine(before[name] - weight, weight - unaligned.get_parameter(name).detach())
        for name, weight in weights.items()
        if weight.ndim == 2 and "embed" not in name
    }
    threshold = sorted(cosines.values())[len(cosines) // 2]
    rule = SafeMerge(strength=0.25, threshold=threshold + 1e-6, unaligned=unaligned, safe=safe)
    found, report = merge(rule, profile, tuned, base)
    notes = {record.parameter: record.notes[0] for record in report.parameters}
    picked = {name for name, alike in cosines.items() if alike <= threshold}
    assert 0 < len(picked) < len(cosines)
    for name in cosines:
        if name in picked:
            expected = 0.8 * before[name] + 0.2 * safe.get_parameter(name).detach()
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[name], before[name])
        assert f"subspace {cosines[name]:.2f}"[:-1] in notes[name]


def test_settings_for_other_parameters_hold_for_merges_too(profile):
    tuned = tiny.perturbed(tiny.llama())
    before = tiny.weights(tuned)
    found, report = merge(Slerp(strength=1.0), profile, tuned, treatment=Treatment(norms="keep", embeddings="reset"))
    assert torch.equal(found["model.norm.weight"], before["model.norm.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], tiny.llama().model.embed_tokens.weight)
    assert report.outcomes["kept"] == 5 and report.outcomes["reset"] == 1


def test_parameters_without_a_moment_follow_the_setting_for_them():
    base, tuned = WithMixture(), WithMixture()
    tuned.load_state_dict(base.state_dict())
    before = tiny.weights(tiny.perturbed(tuned))
    own = collect_profile(base, tiny.rows(24, seed=1), config=ProfileConfig(holdout=0.0), progress=False)
    found, _ = merge(Slerp(strength=1.0), own, tuned, base, treatment=Treatment(uncovered="keep"))
    assert torch.equal(found["mixture"], before["mixture"])
    assert not torch.equal(found["up.weight"], before["up.weight"])


def test_a_measured_strength_is_found_and_holds():
    base = tiny.llama()
    profile = collect_profile(base, tiny.rows(48, seed=1), config=ProfileConfig(holdout=0.5), progress=False)
    tuned = tiny.perturbed(tiny.llama(), scale=0.3)
    before = tiny.weights(tuned)
    held_out = profile.held_out
    unmoved = held_out.read(open_model(tiny.llama()))
    allowed = Drift.between(unmoved, held_out.read(open_model(tuned))).probability_lost / 4
    rule = Slerp(strength=AutoStrength(lost=allowed, confidence=0.5))
    found, report = merge(rule, profile, tuned, base)
    assert report.search.outcome == "found" and 1e-2 <= report.search.strength <= 1e2
    assert Drift.between(unmoved, held_out.read(open_model(tuned))).probability_lost <= allowed
    again, _ = merge(Slerp(strength=report.search.strength), profile, _with(before), base)
    assert tiny.same(found, again)


def _with(weights):
    model = tiny.llama()
    model.load_state_dict(weights, strict=False)
    return model


def test_an_adapter_is_refused_before_anything_is_changed(profile, tmp_path):
    model = adapters.adapted(tiny.llama())
    before = adapters.own_tensors(model)
    with pytest.raises(AdapterError, match=r"^model\.layers\.0\.\S+: slerp merges whole weights.*merge_and_unload"):
        adjust_adapter(model, profile=profile, rule=Slerp(strength=1.0), progress=False)
    assert tiny.same(adapters.own_tensors(model), before)
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(AdapterError, match="dare merges whole weights"):
        adjust_adapter_files(
            tmp_path / "in", profile=profile, output=tmp_path / "out", rule=Dare(strength=1.0), progress=False
        )
    assert not (tmp_path / "out").exists()


def test_rows_of_an_embedding_are_refused_too(profile):
    model = adapters.adapted(tiny.llama(), target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]})
    with pytest.raises(AdapterError, match="slerp merges whole weights"):
        adjust_adapter(model, profile=profile, rule=Slerp(strength=1.0), progress=False)


def test_an_adapter_that_is_refactored_has_whole_weights(profile, tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    model = adapters.trained(get_peft_model(tiny.llama(), adapters.config(use_dora=True)))
    expected, _ = merge(Ties(strength=1.0), profile, adapters.merged(model))
    refactor_adapter(model, output=tmp_path / "out", rank=16, profile=profile, rule=Ties(strength=1.0), progress=False)
    found = tiny.weights(adapters.merged(PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
