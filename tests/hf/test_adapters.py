"""The callback on adapters: what training leaves, what is saved, and that plain PEFT loads it."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer

from safedelta_hf import SafeDelta, SafeDeltaCallback, adjust_adapter, collect_profile
from safedelta_hf.errors import AdapterError, ConfigurationError, NumericalError
from safedelta_hf.modules.adapters import tuner_layers
from safedelta_hf.report.provenance import RECORD_FILE, read_provenance
from tests.fixtures import adapters, tiny
from tests.hf.test_trl import REFUSALS, dpo, sft

ROWS = tiny.rows(24, seed=1)
RULE = SafeDelta(strength=100.0)


def adapted(**changes):
    torch.manual_seed(0)
    return get_peft_model(tiny.llama(), adapters.config(**changes))


def run(model, callback, output, resume=None, **changes) -> Trainer:
    trainer = tiny.trainer(model, callback, output, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_trainer_ends_with_the_adapter_that_adjust_adapter_makes(tmp_path):
    plain, model = adapted(lora_dropout=0.1), adapted(lora_dropout=0.1)
    run(plain, None, tmp_path / "plain")
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    expected = adjust_adapter(plain, profile=profile, rule=RULE, progress=False)
    callback = SafeDeltaCallback(ROWS, RULE)
    trainer = run(model, callback, tmp_path / "run")
    assert tiny.same(adapters.own_tensors(model), adapters.own_tensors(plain))
    assert callback.report.parameters == expected.parameters
    assert set(callback.report.outcomes) == {"adjusted"}
    assert trainer.state.log_history[-1]["safedelta/kept_share"] == callback.report.metrics()["safedelta/kept_share"]


def test_moments_are_those_of_the_base_whatever_the_adapter_holds(tmp_path):
    model = adapters.adapted(tiny.llama(), modules_to_save=["lm_head"], lora_dropout=0.5)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = collect_profile(model.train(), ROWS, progress=False)
    expected = collect_profile(tiny.llama(), ROWS, progress=False)
    assert found.header == expected.header
    assert found.uses == expected.uses
    assert all(torch.equal(found.moments[key].total, expected.moments[key].total) for key in expected.moments)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert not model.get_base_model().model.layers[0].mlp.up_proj.disable_adapters
    assert model.training


def test_no_base_weight_is_copied_or_changed(tmp_path):
    model = adapted()
    before = tiny.weights(tiny.llama())
    callback = SafeDeltaCallback(ROWS, RULE)
    run(model, callback, tmp_path)
    assert callback._run.weights.copied == ()
    assert tiny.same(tiny.weights(model.unload()), before)


def test_what_save_model_writes_is_the_adjusted_adapter_and_loads_in_plain_peft(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    trainer = run(model, SafeDeltaCallback(ROWS, RULE), tmp_path / "run")
    trainer.save_model(str(tmp_path / "saved"))
    said = [path.name for path in (tmp_path / "saved").iterdir() if "safedelta" in path.name.lower()]
    assert said == [RECORD_FILE] and read_provenance(tmp_path / "saved").is_of_weights
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    assert tiny.same(adapters.own_tensors(loaded), adapters.own_tensors(model))
    ids = torch.arange(3, 11)[None]
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_keep_tuned_holds_the_adapter_as_trained(tmp_path):
    plain, model = adapted(), adapted()
    run(plain, None, tmp_path / "plain")
    run(model, SafeDeltaCallback(ROWS, RULE, keep_tuned=tmp_path / "tuned"), tmp_path / "run")
    tuned = PeftModel.from_pretrained(tiny.llama(), tmp_path / "tuned")
    assert tiny.same(adapters.own_tensors(tuned), adapters.own_tensors(plain))
    assert not tiny.same(adapters.own_tensors(tuned), adapters.own_tensors(model))


def test_a_failed_adjustment_saves_the_tuned_adapter(tmp_path, monkeypatch):
    model = adapted()

    def failing(*_):
        raise NumericalError("on purpose")

    monkeypatch.setattr(SafeDelta, "transform", failing)
    with pytest.raises(NumericalError) as caught:
        run(model, SafeDeltaCallback(ROWS, RULE), tmp_path)
    (folder,) = tmp_path.glob("tuned-not-adjusted-*")
    assert str(folder) in caught.value.__notes__[-1]
    assert tiny.same(adapters.own_tensors(PeftModel.from_pretrained(tiny.llama(), folder)), adapters.own_tensors(model))


def test_a_second_train_measures_the_delta_from_the_frozen_base(tmp_path):
    model, callback = adapted(), SafeDeltaCallback(ROWS, RULE)
    run(model, callback, tmp_path / "one")
    profile = callback.profile
    again = copy.deepcopy(model)
    run(again, None, tmp_path / "plain")
    expected = adjust_adapter(again, profile=profile, rule=RULE, progress=False)
    run(model, callback, tmp_path / "two")
    assert callback.profile is profile
    assert callback.report.parameters == expected.parameters
    assert tiny.same(adapters.own_tensors(model), adapters.own_tensors(again))


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(tmp_path):
    whole, resumed = adapted(), adapted()
    steps = {"save_strategy": "steps", "save_steps": 2}
    run(whole, SafeDeltaCallback(ROWS, RULE), tmp_path / "whole", **steps)
    callback = SafeDeltaCallback(ROWS, RULE)
    run(resumed, callback, tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"), **steps)
    assert tiny.same(adapters.own_tensors(resumed), adapters.own_tensors(whole))
    other = get_peft_model(tiny.perturbed(tiny.llama()), adapters.config())
    with pytest.raises(Exception, match="not the base that the resumed run started from"):
        run(other, callback, tmp_path / "other", resume=str(tmp_path / "whole" / "checkpoint-2"), **steps)


def test_biases_of_the_base_that_are_trained_along_are_adjusted_too(tmp_path):
    model = get_peft_model(tiny.gpt2(), adapters.config(target_modules=["c_attn"], fan_in_fan_out=True, bias="all"))
    callback = SafeDeltaCallback(ROWS, SafeDelta(strength=0.0))
    run(model, callback, tmp_path)
    assert callback.report.outcomes["adjusted"] > 10
    found, base = tiny.weights(adapters.merged(model)), tiny.weights(tiny.gpt2())
    assert all(torch.equal(found[name], base[name]) for name in base)


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_an_adapter_that_cannot_be_adjusted_stops_before_training(changes, tmp_path):
    model = adapted(**changes)
    before = tiny.weights(model)
    with pytest.raises(AdapterError):
        run(model, SafeDeltaCallback(ROWS), tmp_path)
    assert tiny.same(tiny.weights(model), before)


def test_several_active_adapters_stop_before_training(tmp_path):
    model = adapted()
    model.add_adapter("other", adapters.config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigurationError, match="2 are active"):
        run(model, SafeDeltaCallback(ROWS), tmp_path)


@pytest.mark.parametrize("add", [adapters.add_by_transformers, adapters.inject])
def test_an_adapter_in_the_layers_of_a_transformers_model_is_adjusted(add, tmp_path):
    model = tiny.llama()
    add(model, "mine")
    callback = SafeDeltaCallback(ROWS, RULE)
    run(model, callback, tmp_path)
    assert set(callback.report.outcomes) == {"adjusted"}
    assert len(callback.report.parameters) == 14


def test_an_injected_adapter_ends_like_one_of_peft_and_its_tuned_form_is_kept(tmp_path):
    wrapped = adapted()
    torch.manual_seed(0)
    model = tiny.llama()
    adapters.inject(model, "default")
    for each, name in ((model, "injected"), (wrapped, "wrapped")):
        run(each, SafeDeltaCallback(ROWS, RULE, keep_tuned=tmp_path / f"tuned {name}"), tmp_path / name)
    found, expected = adapters.own_tensors(model), adapters.own_tensors(wrapped)
    assert tiny.same(found, {name.removeprefix("base_model.model."): value for name, value in expected.items()})


def test_several_active_injected_adapters_stop_before_training(tmp_path):
    model = tiny.llama()
    adapters.inject(model, "mine")
    adapters.inject(model, "other")
    for layer in tuner_layers(model):
        layer.set_adapter(["mine", "other"])
    with pytest.raises(ConfigurationError, match="2 are active: \\['mine', 'other'\\]"):
        run(model, SafeDeltaCallback(ROWS), tmp_path)


@pytest.mark.parametrize("make", [sft, dpo])
def test_a_trl_trainer_that_makes_the_adapter_itself_is_adjusted(make, tmp_path):
    callback = SafeDeltaCallback(REFUSALS, SafeDelta(strength=0.0))
    trainer = make(tiny.llama(), tmp_path, callback, peft_config=adapters.config())
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert set(callback.report.outcomes) == {"adjusted"}
    base = tiny.weights(tiny.llama())
    found = tiny.weights(adapters.merged(trainer.model))
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_the_reference_adapter_of_dpo_is_not_touched(tmp_path):
    model = adapters.adapted(tiny.llama(), scale=0.02)
    started = adapters.own_tensors(model)
    callback = SafeDeltaCallback(REFUSALS, SafeDelta(strength=0.0))
    trainer = dpo(model, tmp_path, callback)
    trainer.train()
    assert "ref" in trainer.model.peft_config
    assert tiny.same(adapters.own_tensors(trainer.model, "ref"), started)
    assert not any(tensor.any() for name, tensor in adapters.own_tensors(trainer.model).items() if "lora_A" in name)


def test_a_tied_weight_that_an_adapter_tunes_twice_stops_before_the_first_step(tmp_path):
    model = adapters.adapted(tiny.llama(tied=True), modules_to_save=["embed_tokens", "lm_head"])
    trainer = tiny.trainer(model, SafeDeltaCallback(ROWS, RULE), tmp_path)
    with pytest.raises(AdapterError, match=r"embed_tokens\.weight: the adapter tunes it in two places"):
        trainer.train()
    assert trainer.state.global_step == 0
