"""Adapters on quantised bases: moments come from activations, and the base is never dequantised."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

from safedelta_hf import SafeDelta, SafeDeltaCallback, adjust_adapter, collect_profile, refactor_adapter
from safedelta_hf.deltas.dense import DenseMatrix
from safedelta_hf.errors import AdapterError, ProfileError
from safedelta_hf.records.uses import Role
from safedelta_hf.report.provenance import read_provenance
from safedelta_hf.rules import LayerMoments
from tests.fixtures import adapters, tiny

ROWS = tiny.rows(24, seed=1)
RULE = SafeDelta(strength=100.0)


def four_bit(**changes):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **changes)


def eight_bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao(name):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)())


KINDS = {
    "nf4, double": lambda: four_bit(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": lambda: four_bit(bnb_4bit_quant_type="fp4"),
    "int8": eight_bit,
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def quantised(request, plain):
    config = KINDS[request.param]()

    def load():
        settings = {"quantization_config": copy.deepcopy(config), "device_map": "cpu", "dtype": torch.float32}
        return LlamaForCausalLM.from_pretrained(plain, **settings)

    load.tolerance = 0.4 if "fp4" in request.param or "nf4" in request.param else 0.1
    return load


def test_a_run_on_a_quantised_base_that_changes_nothing_measures_no_drift(quantised, tmp_path):
    model = get_peft_model(prepare_model_for_kbit_training(quantised()), adapters.config())
    callback = SafeDeltaCallback(ROWS)
    tiny.trainer(model, callback, tmp_path / "run", learning_rate=0.0, bf16=True).train()
    assert [(trial.lost, trial.probability_lost) for trial in callback.report.search.trials] == [(0, 0.0)]
    assert callback.report.search.noise.probability_lost > 0


def test_training_on_a_quantised_base_ends_with_the_adjusted_adapter(quantised, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(prepare_model_for_kbit_training(quantised()), adapters.config())
    twin = copy.deepcopy(adapters.own_tensors(model))
    callback = SafeDeltaCallback(ROWS, RULE, keep_tuned=tmp_path / "tuned")
    tiny.trainer(model, callback, tmp_path / "run").train()
    assert set(callback.report.outcomes) == {"adjusted"}
    assert len(callback.report.parameters) == 14
    assert twin.keys() == adapters.own_tensors(model).keys()
    model.save_pretrained(tmp_path / "saved")
    assert read_provenance(tmp_path / "saved").is_of_weights and read_provenance(tmp_path / "tuned") is None
    tuned = adapters.own_tensors(PeftModel.from_pretrained(quantised(), tmp_path / "tuned"))
    found = adapters.own_tensors(model)
    uses = {use.parameter: use for use in callback.profile.uses}
    for name in {key.split(".lora_")[0] for key in found}:
        up, down = (tuned[f"{name}.lora_{factor}.weight"] for factor in "BA")
        kept_up, kept_down = (found[f"{name}.lora_{factor}.weight"] for factor in "BA")
        use = uses[name.removeprefix("base_model.model.") + ".weight"]
        moments = LayerMoments(safety=callback.profile.moments[use.moment].hessian(torch.device("cpu")))
        state = RULE.factorise(moments)
        delta = 1.5 * up @ down
        wanted = RULE.transform(state, DenseMatrix(delta, Role.LINEAR.view(delta.shape)))(delta)
        torch.testing.assert_close(1.5 * kept_up @ kept_down, wanted, rtol=1e-3, atol=1e-6)
        assert not torch.equal(kept_down, down)


def test_moments_of_a_quantised_base_are_near_those_of_the_base(quantised, plain):
    found = collect_profile(quantised(), ROWS, progress=False)
    expected = collect_profile(tiny.loaded(plain), ROWS, progress=False)
    assert {(use.parameter, use.role) for use in found.uses} == {(use.parameter, use.role) for use in expected.uses}
    for use in expected.uses:
        near, moment = (
            {u.parameter: p.moments[u.moment].total for u in p.uses}[use.parameter] for p in (found, expected)
        )
        assert near.shape == moment.shape
        assert float((near - moment).norm() / moment.norm()) < quantised.tolerance, use.parameter


def test_the_profile_of_the_unquantised_base_is_another(quantised, plain):
    profile = collect_profile(tiny.loaded(plain), ROWS, progress=False)
    model = adapters.trained(get_peft_model(quantised(), adapters.config()))
    with pytest.raises(ProfileError, match="differs below the adapter; collect a profile of this base"):
        adjust_adapter(model, profile=profile, rule=RULE, progress=False)


def test_a_dense_delta_of_a_quantised_weight_is_refused(quantised, tmp_path):
    model = get_peft_model(quantised(), adapters.config(use_dora=True))
    profile = collect_profile(model, ROWS, progress=False)
    with pytest.raises(AdapterError, match="is quantised"):
        refactor_adapter(model, output=tmp_path / "out", rank=4, profile=profile, rule=RULE, progress=False)
