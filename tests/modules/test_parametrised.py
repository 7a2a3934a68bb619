"""Weights that are computed from parameters are adjusted as the weights that they are."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from safedelta_hf import ProfileConfig, Ridge, SafeDelta, SafetyProfile, Treatment, adjust_model, collect_profile
from safedelta_hf.errors import CoverageError, NumericalError, ProfileError
from safedelta_hf.modules.parametrised import parametrised_weights
from tests.fixtures import parametrised, tiny

ROWS = tiny.rows(24, seed=1)
UP = "model.layers.0.mlp.up_proj"


def pair(parametrise, *places, **settings):
    """The base, and what a fine-tuning made of it."""
    base, tuned = (parametrised.llama(parametrise, *places, **settings) for _ in range(2))
    tuned.load_state_dict(base.state_dict())
    return base, tiny.perturbed(tuned)


def adjust(tuned, base, rule, **settings):
    profile = collect_profile(
        base, ROWS, config=ProfileConfig(holdout=0.0, targets=settings.pop("targets", "all-linear")), progress=False
    )
    return adjust_model(tuned, base=base, profile=profile, rule=rule, progress=False, **settings)


@pytest.fixture(params=parametrised.KINDS)
def parametrise(request):
    return parametrised.KINDS[request.param]


@pytest.mark.parametrize("rule", [SafeDelta(strength=30.0), Ridge(strength=0.5)], ids=lambda rule: rule.name)
def test_adjusted_weights_are_those_of_plain_layers_that_hold_the_same_weights(parametrise, rule):
    base, tuned = pair(parametrise)
    plain_base, plain_tuned = parametrised.plain(base), parametrised.plain(tuned)
    report, expected = adjust(tuned, base, rule), adjust(plain_tuned, plain_base, rule)
    found, wanted = tiny.weights(parametrised.plain(tuned)), tiny.weights(plain_tuned)
    before = tiny.weights(plain_base)
    for name, weight in wanted.items():
        assert (found[name] - weight).norm() <= 1e-3 * (weight - before[name]).norm() + 1e-6 * weight.norm(), name
    for name in parametrised_weights(tuned):
        assert not torch.equal(found[name], tiny.weights(parametrised.plain(base))[name])
        one, other = (next(r for r in each.parameters if r.parameter == name) for each in (report, expected))
        assert one.tuned_loss == pytest.approx(other.tuned_loss, rel=1e-4)
        assert one.adjusted_loss == pytest.approx(other.adjusted_loss, rel=1e-3)
        assert one.roles == other.roles and one.outcome == other.outcome == "adjusted"
        assert one.notes[0].startswith("its originals were set by")


def test_an_infinite_budget_leaves_every_original_as_tuned_bit_for_bit(parametrise):
    base, tuned = pair(parametrise)
    before = {name: (p.detach().clone(), p._version) for name, p in tuned.named_parameters()}
    report = adjust(tuned, base, SafeDelta(strength=math.inf, exclude_top=0.0))
    computed = {own for weight in parametrised_weights(tuned).values() for own in weight.originals}
    for name, parameter in tuned.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert name not in computed or parameter._version == before[name][1], "written although nothing changed"
    assert {r.notes for r in report.parameters if r.originals} == {("its originals are as tuned",)}


def test_a_zero_budget_gives_the_originals_of_the_base_bit_for_bit(parametrise):
    base, tuned = pair(parametrise)
    report = adjust(tuned, base, SafeDelta(strength=0.0), treatment=Treatment(embeddings="reset"))
    assert tiny.same(tiny.weights(tuned), tiny.weights(base))
    assert {r.notes for r in report.parameters if r.originals} == {("its originals are those of the base",)}


def test_every_parameter_is_in_the_report_once_by_itself_or_as_an_original(parametrise):
    base, tuned = pair(parametrise)
    report = adjust(tuned, base, Ridge(strength=0.5))
    named = [name for record in report.parameters for name in record.originals or (record.parameter,)]
    assert sorted(named) == sorted(name for name, _ in tuned.named_parameters())
    record = next(record for record in report.parameters if record.parameter == f"{UP}.weight")
    assert record.shape == (24, 16) and set(record.originals) == {n for n in named if n.startswith(UP)}
    assert f"computed from {record.originals[0]}" in " ".join(report.table().split())


@pytest.mark.parametrize("place", ["embed", "up.weight", "up.bias", "norm", "conv"])
def test_whatever_a_computed_weight_is_used_for_it_has_the_moment_of_a_plain_one(place):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.norm = nn.Embedding(tiny.VOCABULARY, 8), nn.Linear(8, 8), nn.LayerNorm(8)
            self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)

        def forward(self, input_ids, labels=None):
            hidden = self.conv(self.norm(self.up(self.embed(input_ids))).mT)
            return {"logits": hidden}

    base, other = Model(), Model()
    other.load_state_dict(base.state_dict())
    module, _, key = place.partition(".")
    parametrize.register_parametrization(other.get_submodule(module), key or "weight", parametrised.Gated())
    one, two = (collect_profile(model, ROWS, progress=False) for model in (base, other))
    assert set(two.header.parametrised) == {place if key else f"{place}.weight"}
    assert set(one.uses) == set(two.uses)
    for key, moment in one.moments.items():
        torch.testing.assert_close(two.moments[key].total, moment.total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", parametrised.STUBBORN)
def test_a_weight_that_cannot_be_set_is_named_and_nothing_is_changed(kind):
    parametrise, reason = parametrised.STUBBORN[kind]
    base, tuned = pair(parametrise, "model.layers.0.self_attn.q_proj")
    profile = collect_profile(base, ROWS, config=ProfileConfig(holdout=0.0), progress=False)
    original = "model.layers.0.self_attn.q_proj.parametrizations.weight.original"
    assert profile.header.skipped[original].startswith("model.layers.0.self_attn.q_proj.weight is computed from it")
    before = tiny.weights(tuned)
    with pytest.raises(CoverageError, match=reason):
        adjust_model(tuned, base=base, profile=profile, rule=Ridge(strength=0.5), progress=False)
    assert tiny.same(tiny.weights(tuned), before)
    for choice, expected in (("keep", before), ("reset", tiny.weights(base))):
        treatment = Treatment(uncovered=choice)
        adjust_model(tuned, base=base, profile=profile, rule=Ridge(strength=0.5), treatment=treatment, progress=False)
        assert torch.equal(tuned.get_parameter(original), expected[original])
        tuned.load_state_dict(before, strict=False)


def test_a_weight_that_turns_out_not_to_be_settable_undoes_the_others(monkeypatch):
    base, tuned = pair(parametrised.KINDS["gated"])
    before = tiny.weights(tuned)
    profile = collect_profile(base, ROWS, config=ProfileConfig(holdout=0.0), progress=False)
    calls = []

    def first_only(self, weight):
        calls.append(weight)
        return weight / self.log_scale.exp() + (len(calls) > 1)

    monkeypatch.setattr(parametrised.Gated, "right_inverse", first_only)
    with pytest.raises(CoverageError, match=r"proj\.weight: .*set to a given weight, computes another"):
        adjust_model(tuned, base=base, profile=profile, rule=Ridge(strength=0.5), progress=False)
    assert len(calls) == 2 and tiny.same(tiny.weights(tuned), before)


def test_a_row_of_zeros_has_no_direction_and_is_an_error_rather_than_nan():
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    (weight,) = parametrised_weights(layer).values()
    with pytest.raises(CoverageError, match="off by nan"):
        weight.inverted(torch.zeros(3, 4))


def test_what_cannot_be_copied_out_of_its_layer_has_that_for_a_reason():
    class Attached(parametrised.Gated):
        def __deepcopy__(self, memo):
            raise TypeError("one of a kind")

    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", Attached())
    (weight,) = parametrised_weights(layer).values()
    assert "apart from its layer (TypeError: one of a kind)" in weight.obstacle()


def test_a_diverged_computed_weight_is_named():
    base, tuned = pair(parametrizations.weight_norm, UP)
    with torch.no_grad():
        tuned.get_submodule(UP).parametrizations.weight.original1[0] = 0.0
    with pytest.raises(NumericalError, match=rf"{UP}\.weight: the fine-tuned weight holds NaN"):
        adjust(tuned, base, Ridge(strength=0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dimension", [0, 1, None])
def test_weight_norm_comes_out_within_a_step_of_its_data_type(dtype, dimension):
    layer = parametrizations.weight_norm(nn.Linear(512, 384, dtype=dtype), dim=dimension)
    (weight,) = parametrised_weights(layer).values()
    wanted = torch.randn(384, 512).to(dtype)
    found = weight.computed(weight.inverted(wanted))
    assert (found - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()


def test_looking_for_the_way_back_leaves_the_model_as_it_was():
    layer = parametrizations.orthogonal(nn.Linear(6, 6))
    parametrizations.spectral_norm(layer.train(), "bias")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for weight in parametrised_weights(layer).values():
        weight.obstacle()
    after = layer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()) and after.keys() == before.keys()


def test_collecting_leaves_no_hook_behind(parametrise):
    base = parametrised.llama(parametrise)
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in base.named_modules()}
    collect_profile(base, ROWS, progress=False)
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in base.named_modules()} == hooks


def test_a_saved_profile_knows_what_is_computed_from_what(tmp_path):
    base, tuned = pair(parametrizations.weight_norm)
    profile = collect_profile(base, ROWS, config=ProfileConfig(holdout=0.0), progress=False)
    profile.save(tmp_path / "profile")
    assert SafetyProfile.load(tmp_path / "profile").header == profile.header and profile.header.parametrised


def test_a_profile_of_a_model_that_computes_the_weight_is_refused_by_one_that_does_not():
    base, tuned = pair(parametrised.old_weight_norm, UP)
    profile = collect_profile(base, ROWS, config=ProfileConfig(holdout=0.0), progress=False)
    tuned.get_submodule(UP)._forward_pre_hooks.clear()
    before = tiny.weights(tuned)
    with pytest.raises(ProfileError, match=rf"{UP}\.weight: the model of the profile computes it from {UP}\.weight_g"):
        adjust_model(tuned, base=base, profile=profile, rule=Ridge(strength=0.5), progress=False)
    assert tiny.same(tiny.weights(tuned), before)


def test_targets_choose_computed_weights_by_the_name_of_their_layer():
    base, tuned = pair(parametrizations.weight_norm)
    before = tiny.weights(tuned)
    report = adjust(
        tuned, base, Ridge(strength=0.5), targets=["up_proj"], treatment=Treatment(uncovered="keep", norms="keep")
    )
    assert {record.parameter for record in report.parameters if record.originals} == {f"{UP}.weight"}
    reasons = {record.parameter: record.reason for record in report.parameters}
    assert "not among the targets" in reasons["lm_head.parametrizations.weight.original0"]
    assert torch.equal(
        tuned.lm_head.parametrizations.weight.original0, before["lm_head.parametrizations.weight.original0"]
    )
    assert next(r for r in report.parameters if r.parameter == f"{UP}.weight").outcome == "adjusted"


def test_the_setting_for_the_head_holds_for_a_computed_one():
    base, tuned = pair(parametrizations.weight_norm, "lm_head")
    report = adjust(tuned, base, Ridge(strength=0.5), treatment=Treatment(head="reset"))
    record = next(record for record in report.parameters if record.originals)
    assert record.outcome == "reset" and record.parameter == "lm_head.weight"
    for name in record.originals:
        assert torch.equal(tuned.get_parameter(name), base.get_parameter(name))


def test_an_original_that_is_used_elsewhere_too_is_left_to_what_is_seen_of_it():
    model = tiny.llama(tied=True)
    parametrize.register_parametrization(model.lm_head, "weight", parametrised.Gated())
    assert model.lm_head.parametrizations.weight.original is model.model.embed_tokens.weight
    assert parametrised_weights(model) == {}
    profile = collect_profile(model, ROWS, progress=False)
    assert profile.header.parametrised == {}


def test_a_weight_that_is_noisy_in_training_is_its_original_in_evaluation():
    base, tuned = (tiny.llama() for _ in range(2))
    for model in (base, tuned):
        parametrize.register_parametrization(model.get_submodule(UP), "weight", parametrised.Noisy())
    assert "changes in training by itself" in parametrised_weights(base)[f"{UP}.weight"].obstacle()
    report = adjust(tiny.perturbed(tuned), base, Ridge(strength=0.5))
    outcomes = {record.parameter: record.outcome for record in report.parameters}
    assert outcomes[f"{UP}.parametrizations.weight.original"] == "adjusted"


def test_a_layer_that_is_called_twice_sums_both_calls():
    class Twice(tiny.Plain):
        def forward(self, input_ids, labels=None):
            hidden = torch.tanh(self.square(self.embed(input_ids)))
            return {"logits": self.down(torch.relu(self.up(self.square(hidden))))}

        def __init__(self):
            super().__init__()
            self.square = nn.Linear(8, 8)

    plain, normed = Twice(), Twice()
    normed.load_state_dict(plain.state_dict())
    parametrizations.weight_norm(normed.square)
    one, two = (
        collect_profile(model, ROWS, progress=False).moments["square.weight:linear"] for model in (plain, normed)
    )
    torch.testing.assert_close(one.total, two.total)
    assert one.tokens == two.tokens == 2 * sum(len(row["input_ids"]) for row in ROWS)
