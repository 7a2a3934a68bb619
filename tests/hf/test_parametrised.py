"""The callback on models with weight-normed and otherwise parametrised layers."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import parametrizations, parametrize

from safedelta_hf import SafeDelta, SafeDeltaCallback, Treatment
from safedelta_hf.errors import BaseWeightsError, CoverageError
from tests.fixtures import parametrised, tiny

ROWS = tiny.rows(24, seed=1)
RULE = SafeDelta(strength=3.0)
NOTHING_KEPT = SafeDelta(strength=0.0)
RESET = Treatment(embeddings="reset")


def plain_module():
    torch.manual_seed(0)
    model = tiny.Plain()
    parametrizations.weight_norm(model.up)
    parametrize.register_parametrization(model.down, "weight", parametrised.Gated())
    return model


MODELS = {
    "plain": plain_module,
    "llama": lambda: parametrised.llama(parametrizations.weight_norm),
    "old": lambda: parametrised.llama(parametrised.old_weight_norm),
}


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def test_an_infinite_budget_ends_as_without_the_callback_bit_for_bit(make, tmp_path):
    model, reference = make(), make()
    tiny.trainer(model, SafeDeltaCallback(ROWS, SafeDelta(strength=math.inf, exclude_top=0.0)), tmp_path / "1").train()
    tiny.trainer(reference, None, tmp_path / "2").train()
    assert tiny.same(tiny.weights(model), tiny.weights(reference))


def test_a_zero_budget_ends_at_the_base_bit_for_bit(make, tmp_path):
    model, base = make(), make()
    tiny.trainer(model, SafeDeltaCallback(ROWS, NOTHING_KEPT, treatment=RESET), tmp_path).train()
    assert tiny.same(tiny.weights(model), tiny.weights(base))


def test_a_measured_strength_is_found(tmp_path):
    model = MODELS["llama"]()
    callback = SafeDeltaCallback(ROWS)
    tiny.trainer(model, callback, tmp_path).train()
    assert callback.report.search is not None
    assert {r.outcome for r in callback.report.parameters if r.originals} == {"adjusted"}


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(tmp_path):
    whole, resumed = MODELS["llama"](), MODELS["llama"]()
    tiny.trainer(whole, SafeDeltaCallback(ROWS, RULE), tmp_path / "whole", save_strategy="epoch").train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    trainer = tiny.trainer(resumed, SafeDeltaCallback(ROWS, RULE, base=MODELS["llama"]()), tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=checkpoint)
    assert tiny.same(tiny.weights(resumed), tiny.weights(whole))
    with pytest.raises(BaseWeightsError, match="in no file when the run started"):
        again = tiny.trainer(MODELS["llama"](), SafeDeltaCallback(ROWS, RULE), tmp_path / "again")
        again.train(resume_from_checkpoint=checkpoint)


def test_originals_that_were_frozen_need_no_copy(tmp_path):
    model = MODELS["llama"]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("original0")
    before = tiny.weights(model)
    callback = SafeDeltaCallback(ROWS, RULE)
    tiny.trainer(model, callback, tmp_path).train()
    outcomes = {record.parameter: record.outcome for record in callback.report.parameters}
    assert outcomes["lm_head.weight"] == "adjusted" and callback.report.outcomes["adjusted"] == 3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "parametrizations" not in name)


@pytest.mark.parametrize("kind", parametrised.STUBBORN)
def test_what_cannot_be_set_stops_the_run_before_its_first_step(kind, tmp_path):
    parametrise, reason = parametrised.STUBBORN[kind]
    model = parametrised.llama(parametrise, "model.layers.0.self_attn.q_proj")
    trainer = tiny.trainer(model, SafeDeltaCallback(ROWS, RULE), tmp_path)
    with pytest.raises(CoverageError, match=reason):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_saved_model_is_the_adjusted_one(tmp_path):
    model = MODELS["llama"]()
    trainer = tiny.trainer(model, SafeDeltaCallback(ROWS, RULE), tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert tiny.same(saved, tiny.weights(model))
