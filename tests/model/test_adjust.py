import copy
import dataclasses
import math
from dataclasses import dataclass, field

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from safedelta_hf import ProfileConfig, SafeDelta, Treatment, adjust_model, collect_profile
from safedelta_hf.adjust.factors import FactorCache
from safedelta_hf.errors import (
    AdjustmentError,
    BaseWeightsError,
    ConfigurationError,
    CoverageError,
    NumericalError,
    ProfileError,
)
from safedelta_hf.profile.moments import Moments
from tests.fixtures import architectures, oracles, tiny

MODELS = {
    "llama": tiny.llama,
    "tied llama": lambda: tiny.llama(tied=True),
    "biased llama": lambda: tiny.llama(attention_bias=True, mlp_bias=True),
    "gpt2": tiny.gpt2,
    "plain": tiny.Plain,
    "bfloat16 llama": lambda: tiny.llama().bfloat16(),
}
ROWS = tiny.rows(24, seed=1)


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def collected(base):
    return collect_profile(base, ROWS, config=ProfileConfig(holdout=0.0), progress=False)


def adjust(tuned, base, profile=None, rule=None, **settings):
    profile = profile or collected(base)
    return adjust_model(tuned, base=base, profile=profile, rule=rule or SafeDelta(), progress=False, **settings)


def test_zero_strength_gives_the_base_bit_for_bit_where_the_safety_data_reaches(make):
    torch.manual_seed(0)
    base = make()
    tuned = make()
    tuned.load_state_dict(base.state_dict())
    tiny.perturbed(tuned)
    perturbed = tiny.weights(tuned)
    profile = collected(base)
    adjust(tuned, base, profile, SafeDelta(strength=0.0))
    used = torch.bincount(torch.tensor(sum((row["input_ids"] for row in ROWS), [])), minlength=tiny.VOCABULARY) > 0
    for name, parameter in tuned.named_parameters():
        expected = dict(base.named_parameters())[name]
        if "wpe" in name:
            assert torch.equal(parameter[:4], expected[:4]) and torch.equal(parameter[9:], perturbed[name][9:])
        elif "embed" in name and not (
            hasattr(base, "lm_head") and base.lm_head.weight is base.model.embed_tokens.weight
        ):
            assert torch.equal(parameter[used], expected[used])
            assert torch.equal(parameter[~used], perturbed[name][~used])
        else:
            assert torch.equal(parameter, expected), name


def test_infinite_strength_gives_the_tuned_weights_bit_for_bit(make):
    torch.manual_seed(0)
    base, tuned = make(), make()
    tuned.load_state_dict(base.state_dict())
    expected = tiny.weights(tiny.perturbed(tuned))
    adjust(tuned, base, rule=SafeDelta(strength=math.inf, exclude_top=0.0))
    assert tiny.same(tiny.weights(tuned), expected)


def test_base_and_tuned_that_are_swapped_are_refused(make):
    torch.manual_seed(0)
    base, tuned = make(), make()
    tuned.load_state_dict(base.state_dict())
    profile, before = collected(base), tiny.weights(tiny.perturbed(tuned))
    with pytest.raises(BaseWeightsError, match="base: a model in memory and the fine-tuned model look swapped"):
        adjust(base, tuned, profile)
    assert tiny.same(tiny.weights(tuned), before)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_a_named_error_and_every_weight_is_as_it_was(error, monkeypatch):
    base, tuned = tiny.llama(), tiny.perturbed(tiny.llama())
    before, calls = tiny.weights(tuned), []

    def filling(*given):
        calls.append(given)
        if len(calls) > 3:
            raise error
        save_file(*given)

    monkeypatch.setattr("safedelta_hf.weights.journal.save_file", filling)
    with pytest.raises(
        AdjustmentError, match="while adjusting the weights .*No space left.*the weights are as they were"
    ):
        adjust(tuned, base)
    assert len(calls) == 4 and tiny.same(tiny.weights(tuned), before)


def test_an_untouched_model_is_left_bit_identical_and_the_report_says_so(make):
    torch.manual_seed(0)
    base, tuned = make(), make()
    tuned.load_state_dict(base.state_dict())
    before = {name: (p.data_ptr(), p._version) for name, p in tuned.named_parameters()}
    report = adjust(tuned, base)
    assert {name: (p.data_ptr(), p._version) for name, p in tuned.named_parameters()} == before
    assert set(report.outcomes) == {"unchanged"} and not report.changed_anything
    assert "changed nothing" in report.table()


def test_every_parameter_is_in_the_report_once(make):
    torch.manual_seed(0)
    base, tuned = make(), make()
    tuned.load_state_dict(base.state_dict())
    report = adjust(tiny.perturbed(tuned), base)
    assert sorted(record.parameter for record in report.parameters) == sorted(n for n, _ in tuned.named_parameters())


@pytest.mark.parametrize("compensation", ["joint", "sequential", "none"])
def test_linear_layers_equal_the_float64_oracle(compensation):
    base, tuned = tiny.llama(), tiny.perturbed(tiny.llama())
    name = "model.layers.0.mlp.down_proj.weight"
    profile = collected(base)
    delta = (tuned.get_parameter(name) - base.get_parameter(name)).detach()
    hessian = next(profile.moments[use.moment] for use in profile.uses if use.parameter == name).hessian(
        torch.device("cpu")
    )
    report = adjust(tuned, base, profile, SafeDelta(strength=3.0, compensation=compensation))
    found = (tuned.get_parameter(name) - base.get_parameter(name)).detach()
    kept = (tuned.get_parameter(name) == base.get_parameter(name) + delta).all(0)
    damped = oracles.damped(hessian, 0.01)
    pivots = 1 / oracles.upper_factor_of_inverse(damped).diagonal().square()
    chosen = oracles.greedy_entries(delta, pivots, float(pivots.mean()) * 3.0 / 2 * 16 / 4096)
    whole = {m for m in range(24) if sum(entry[1] == m for entry in chosen) == 16}
    assert set(kept.nonzero().flatten().tolist()) == whole and 0 < len(whole) < 24
    expected = {
        "joint": lambda: oracles.best_compensation(delta, kept, damped),
        "sequential": lambda: oracles.published_sweep(delta, kept.expand_as(delta), damped),
        "none": lambda: torch.where(kept, delta, 0.0).double(),
    }[compensation]()
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    record = next(record for record in report.parameters if record.parameter == name)
    assert record.tuned_loss == pytest.approx(oracles.loss(delta, hessian), rel=1e-3)
    assert record.adjusted_loss == pytest.approx(oracles.loss(expected, hessian), rel=2e-2, abs=1e-9)
    assert record.delta_energy == pytest.approx(float(delta.double().square().sum()), rel=1e-4)
    assert record.lost_energy == pytest.approx(float((delta - expected).square().sum()), rel=1e-3)


def test_the_safety_loss_of_every_parameter_falls(make):
    torch.manual_seed(0)
    base, tuned = make(), make()
    tuned.load_state_dict(base.state_dict())
    report = adjust(tiny.perturbed(tuned), base, rule=SafeDelta(strength=1.0))
    for record in report.parameters:
        assert record.adjusted_loss <= record.tuned_loss * 1.02 + 1e-9, record


def test_a_tied_weight_is_written_once_and_stays_tied():
    base, tuned = tiny.llama(tied=True), tiny.perturbed(tiny.llama(tied=True))
    version = tuned.lm_head.weight._version
    report = adjust(tuned, base, rule=SafeDelta(strength=5.0))
    (record,) = (record for record in report.parameters if record.parameter == "model.embed_tokens.weight")
    assert record.aliases == ("lm_head.weight",) and set(record.roles) == {"embedding", "head"}
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
    assert tuned.lm_head.weight._version == version + 1


@pytest.mark.parametrize("action", ["keep", "reset"])
@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("embeddings", ["transformer.wpe.weight"]),
        ("norms", ["transformer.ln_f.weight"]),
        ("biases", ["transformer.h.0.mlp.c_fc.bias", "transformer.ln_f.bias"]),
    ],
)
def test_an_explicit_setting_decides(setting, names, action):
    base, tuned = tiny.gpt2(), tiny.perturbed(tiny.gpt2())
    expected = tiny.weights(tuned if action == "keep" else base)
    report = adjust(tuned, base, treatment=Treatment(**{setting: action}))
    records = {record.parameter: record for record in report.parameters}
    for name in names:
        assert torch.equal(tuned.get_parameter(name), expected[name])
        assert records[name].outcome == {"keep": "kept", "reset": "reset"}[action]
        assert f"is {action}" in records[name].reason
    assert records["transformer.h.0.mlp.c_fc.weight"].outcome == "adjusted"


def test_of_a_tied_weight_the_stronger_setting_counts():
    base = tiny.llama(tied=True)
    profile = collected(base)
    outcomes = {}
    for head in ("adjust", "keep", "reset"):
        tuned = tiny.perturbed(tiny.llama(tied=True))
        report = adjust(tuned, base, profile, treatment=Treatment(embeddings="keep", head=head))
        outcomes[head] = next(r for r in report.parameters if r.parameter == "model.embed_tokens.weight")
    assert {head: record.outcome for head, record in outcomes.items()} == {
        "adjust": "adjusted",
        "keep": "kept",
        "reset": "reset",
    }
    assert outcomes["adjust"].roles == ("head",)


def test_settings_out_of_range_are_named():
    with pytest.raises(ConfigurationError, match=r"norms='drop' is not one of \['adjust', 'keep', 'reset'\]"):
        Treatment(norms="drop")
    with pytest.raises(ConfigurationError, match=r"uncovered='adjust' is not one of \['error'"):
        Treatment(uncovered="adjust")


class WithMixture(tiny.Plain):
    """Has a parameter that no rule covers: its entries depend on one another before they meet anything."""

    def __init__(self):
        super().__init__()
        self.mixture = nn.Parameter(torch.zeros(8))

    def forward(self, input_ids):
        return self.down(torch.relu(self.up(self.embed(input_ids) * self.mixture.softmax(0))))


@pytest.fixture
def with_mixture():
    base, tuned = WithMixture(), WithMixture()
    tuned.load_state_dict(base.state_dict())
    return base, tiny.perturbed(tuned)


def test_trained_parameters_that_cannot_be_covered_stop_before_anything_is_changed(with_mixture):
    base, tuned = with_mixture
    before = tiny.weights(tuned)
    with pytest.raises(CoverageError, match=r"1 trained parameters.*\n  mixture: .*aten\._softmax"):
        adjust(tuned, base)
    assert tiny.same(before, tiny.weights(tuned))


@pytest.mark.parametrize("choice", ["keep", "reset"])
def test_uncovered_parameters_follow_the_setting_with_the_reason(with_mixture, choice):
    base, tuned = with_mixture
    expected = tiny.weights(tuned if choice == "keep" else base)
    report = adjust(tuned, base, treatment=Treatment(uncovered=choice))
    assert torch.equal(tuned.mixture, expected["mixture"])
    record = next(record for record in report.parameters if record.parameter == "mixture")
    assert record.outcome == {"keep": "kept", "reset": "reset"}[choice] and "_softmax" in record.reason


def test_uncovered_parameters_that_were_not_trained_do_not_matter(with_mixture):
    base, tuned = with_mixture
    with torch.no_grad():
        tuned.mixture.copy_(base.mixture)
    assert adjust(tuned, base).outcomes == {"adjusted": 5, "unchanged": 1}


def test_an_expert_that_the_safety_data_never_reaches_keeps_its_delta_and_the_report_says_so():
    base = architectures.tiny_model("mixtral")
    tuned = tiny.perturbed(copy.deepcopy(base))
    before = tiny.weights(tuned)
    name = "model.layers.0.mlp.experts.down_proj"
    profile = collect_profile(base, [{"input_ids": [5]}], progress=False)
    report = adjust(tuned, base, profile, SafeDelta(strength=0.0))
    reached = {use.view.start // (32 * 48) for use in profile.uses if use.parameter == name}
    assert len(reached) == 2
    for index in range(4):
        expected = base.get_parameter(name) if index in reached else before[name]
        assert torch.equal(tuned.get_parameter(name)[index], expected[index])
    record = next(record for record in report.parameters if record.parameter == name)
    assert record.outcome == "adjusted" and "never reached 2 of its 4 parts, which keep their delta" in record.reason


def test_one_hessian_of_many_experts_is_held_at_a_time(monkeypatch):
    base = architectures.tiny_model("mixtral")
    held = []
    hold = FactorCache.hold
    monkeypatch.setattr(
        FactorCache, "hold", lambda self, uses, device: (hold(self, uses, device), held.append(len(self._hessians)))
    )
    adjust(tiny.perturbed(copy.deepcopy(base)), base)
    assert max(held) == 1


def test_base_may_be_a_folder(tmp_path):
    base = tiny.llama(tied=True)
    base.save_pretrained(tmp_path)
    one, other = (tiny.perturbed(tiny.llama(tied=True)) for _ in range(2))
    profile = collected(base)
    adjust(one, base, profile)
    report = adjust(other, tmp_path, profile)
    assert tiny.same(tiny.weights(one), tiny.weights(other)) and report.base == str(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_weight_is_named_and_nothing_is_changed(value):
    base, tuned = tiny.llama(), tiny.perturbed(tiny.llama())
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight[0, 0] = value
    before = tiny.weights(tuned)
    with pytest.raises(NumericalError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: the fine-tuned weight"):
        adjust(tuned, base)
    assert all(torch.equal(before[name].nan_to_num(), p.nan_to_num()) for name, p in tuned.named_parameters())


def test_another_base_is_an_error():
    base, tuned = tiny.llama(), tiny.perturbed(tiny.llama())
    with pytest.raises(BaseWeightsError, match="not that of the base model"):
        adjust(tuned, tiny.perturbed(tiny.llama(), seed=9), collected(base))


def test_a_profile_of_another_architecture_is_an_error():
    base, tuned = tiny.llama(), tiny.perturbed(tiny.llama())
    with pytest.raises(ProfileError, match="made for GPT2LMHeadModel with 28 parameters, this is LlamaForCausalLM"):
        adjust(tuned, base, collected(tiny.gpt2()))


def test_a_resized_vocabulary_is_an_error():
    base, tuned = tiny.llama(), tiny.perturbed(tiny.llama())
    tuned.resize_token_embeddings(tiny.VOCABULARY + 8)
    with pytest.raises(BaseWeightsError, match="vocabulary resized"):
        adjust(tuned, base)


def test_a_profile_with_a_moment_of_the_wrong_size_is_an_error():
    base, tuned = tiny.llama(), tiny.perturbed(tiny.llama())
    profile = collected(base)
    key = "model.layers.0.mlp.down_proj.weight"
    wrong = dict(profile.moments) | {f"{key}:linear": profile.moments["lm_head.weight:head"]}
    with pytest.raises(ProfileError, match=rf"{key}: has 24 inputs"):
        adjust(tuned, base, dataclasses.replace(profile, moments=Moments(wrong)))


@dataclass(frozen=True, kw_only=True)
class Trap(SafeDelta):
    """A rule that fails at the third layer, after weights have been written."""

    error: BaseException
    calls: list = field(default_factory=list)

    def transform(self, factors, delta):
        self.calls.append(1)
        if len(self.calls) == 3:
            raise self.error
        return super().transform(factors, delta)


@pytest.mark.parametrize("error", [NumericalError("broken"), MemoryError(), KeyboardInterrupt()])
def test_a_failure_half_way_changes_nothing_and_can_be_repeated(error):
    base, tuned = tiny.llama(), tiny.perturbed(tiny.llama())
    before, profile = tiny.weights(tuned), collected(base)
    named = AdjustmentError if isinstance(error, MemoryError) else type(error)
    with pytest.raises(named) as raised:
        adjust(tuned, base, profile, Trap(error=error))
    assert named is type(error) or raised.value.__cause__ is error
    if isinstance(error, NumericalError):
        assert str(raised.value) == "model.layers.0.self_attn.q_proj.weight: broken"
    assert tiny.same(before, tiny.weights(tuned))
    assert adjust(tuned, base, profile).changed_anything


def test_each_hessian_is_factored_once(monkeypatch):
    base, tuned = tiny.llama(tied=True), tiny.perturbed(tiny.llama(tied=True))
    profile, factored = collected(base), []
    factorise = SafeDelta.factorise
    monkeypatch.setattr(SafeDelta, "factorise", lambda self, m: factored.append(m.safety.shape) or factorise(self, m))
    adjust(tuned, base, profile)
    assert len(factored) == len(profile.moments)


def test_the_hessian_of_each_expert_is_factored_once(monkeypatch):
    base = architectures.tiny_model("mixtral")
    tuned = tiny.perturbed(copy.deepcopy(base))
    profile, factored = collected(base), []
    factorise = SafeDelta.factorise
    monkeypatch.setattr(SafeDelta, "factorise", lambda self, m: factored.append(m.safety.shape) or factorise(self, m))
    adjust(tuned, base, profile)
    assert any("[" in use.moment for use in profile.uses)
    assert len(factored) <= len(profile.uses)


def test_the_same_weights_in_another_dtype_are_unchanged(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    half = tiny.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    profile = collected(half)
    report = adjust(half.float(), tmp_path, profile)
    assert set(report.outcomes) == {"unchanged"}


def test_the_base_cannot_be_the_model_itself():
    model = tiny.llama()
    with pytest.raises(BaseWeightsError, match="shares its weights with the fine-tuned model"):
        adjust(model, model, collected(model))
