"""Offloaded models are profiled, adjusted and trained as the same models in memory, bit for bit."""

import copy
import shutil
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer

from safedelta_hf import (
    Ridge,
    SafeDelta,
    SafeDeltaCallback,
    adjust_adapter,
    adjust_model,
    collect_profile,
)
from safedelta_hf.distributed.offload import OffloadedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ConfigurationError, NumericalError
from tests.fixtures import adapters, refusing, tiny
from tests.fixtures.offloading import KINDS, SAVABLE, in_memory, logits, offloaded

ROWS = tiny.rows(24, seed=1)
RULES = {
    "safe_delta": SafeDelta(strength=3.0),
    "published": SafeDelta(strength=3.0, compensation="sequential"),
    "ridge": Ridge(strength=0.1),
}


def mixtral():
    """Its experts are stored in another form than it computes with, so that loading saves them anew."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return MixtralForCausalLM(MixtralConfig(vocab_size=tiny.VOCABULARY, pad_token_id=0, **sizes, **heads)).eval()


def values(model):
    opened = open_model(model)
    return {name: opened.read(name).clone() for name in opened.all_names}


@pytest.fixture
def base(tmp_path):
    """The folder of a base model, whose tuned ones are `offloaded(..., tmp_path)`."""

    def make(*, tied=True, dtype=torch.float32):
        tiny.llama(tied=tied).to(dtype).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_is_that_of_the_model_in_memory(kind, tied, tmp_path):
    model = offloaded(kind, tmp_path, tied=tied)
    expected = collect_profile(in_memory(tmp_path), ROWS, progress=False)
    for _ in range(2):
        found = collect_profile(model, ROWS, progress=False)
        assert found.header == expected.header
        assert found.uses == expected.uses
        assert found.held_out == expected.held_out
        assert all(torch.equal(found.moments[key].total, expected.moments[key].total) for key in expected.moments)


@pytest.mark.parametrize(
    ("kind", "tied", "rule"),
    [(kind, tied, "safe_delta") for kind in SAVABLE for tied in (True, False)]
    + [("disk", False, rule) for rule in RULES if rule != "safe_delta"],
)
def test_an_adjusted_model_is_saved_as_the_one_adjusted_in_memory(kind, tied, rule, base, tmp_path):
    folder = base(tied=tied)
    model, twin = offloaded(kind, tmp_path, tied=tied), in_memory(tmp_path)
    profile = collect_profile(tiny.loaded(folder), ROWS, holdout=0.0, progress=False)
    found = adjust_model(model, base=folder, profile=profile, rule=RULES[rule], progress=False)
    expected = adjust_model(twin, base=folder, profile=profile, rule=RULES[rule], progress=False)
    assert found == expected
    assert set(found.outcomes) == {"adjusted"}
    model.save_pretrained(tmp_path / "saved")
    twin.save_pretrained(tmp_path / "expected")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "expected")]
    assert files[0] == files[1]
    assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("make", [tiny.gpt2, mixtral])
def test_layers_of_other_kinds_are_adjusted_as_in_memory(make, tmp_path):
    aligned = make()
    tiny.perturbed(copy.deepcopy(aligned)).save_pretrained(tmp_path / "model")
    load = partial(AutoModelForCausalLM.from_pretrained, tmp_path / "model")
    model, twin = load(device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"), load()
    profile = collect_profile(aligned, ROWS, holdout=0.0, progress=False)
    reports = [
        adjust_model(one, base=aligned, profile=profile, rule=SafeDelta(), progress=False) for one in (model, twin)
    ]
    assert reports[0] == reports[1]
    assert tiny.same(values(model), values(twin))
    found = collect_profile(model, ROWS, holdout=0.0, progress=False)
    expected = collect_profile(twin, ROWS, holdout=0.0, progress=False)
    assert found.header == expected.header
    assert all(torch.equal(found.moments[key].total, expected.moments[key].total) for key in expected.moments)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SAVABLE])
def test_models_that_transformers_cannot_save_are_adjusted_all_the_same(kind, base, tmp_path):
    folder = base()
    model, twin = offloaded(kind, tmp_path), in_memory(tmp_path)
    profile = collect_profile(tiny.loaded(folder), ROWS, holdout=0.0, progress=False)
    for one in (model, twin):
        adjust_model(one, base=folder, profile=profile, rule=SafeDelta(), progress=False)
    assert tiny.same(values(model), values(twin))


@pytest.mark.parametrize("kind", ["disk", "cpu_offload"])
def test_the_base_may_be_offloaded_too(kind, base, tmp_path):
    folder = base()
    (tmp_path / "other").mkdir()
    shutil.copytree(folder, tmp_path / "other" / "model")
    aligned = KINDS[kind](folder, tmp_path / "other" / "offloaded")
    model, twin = offloaded("disk", tmp_path), in_memory(tmp_path)
    profile = collect_profile(aligned, ROWS, holdout=0.0, progress=False)
    adjust_model(model, base=aligned, profile=profile, rule=SafeDelta(), progress=False)
    adjust_model(twin, base=folder, profile=profile, rule=SafeDelta(), progress=False)
    assert tiny.same(values(model), values(twin))


def test_bfloat16_stays_bit_for_bit(base, tmp_path):
    folder = base(dtype=torch.bfloat16)
    model, twin = offloaded("disk", tmp_path, dtype=torch.bfloat16), in_memory(tmp_path)
    profile = collect_profile(tiny.loaded(folder), ROWS, holdout=0.0, progress=False)
    for one in (model, twin):
        adjust_model(one, base=folder, profile=profile, rule=SafeDelta(), progress=False)
    assert tiny.same(values(model), values(twin))


def test_a_measured_strength_is_that_of_the_model_in_memory(tmp_path):
    aligned = refusing.base()
    aligned.save_pretrained(tmp_path / "base")
    refusing.fine_tuned(aligned).save_pretrained(tmp_path / "model")
    (tmp_path / "offloaded").mkdir()
    model, twin = KINDS["some on disk"](tmp_path / "model", tmp_path / "offloaded"), in_memory(tmp_path)
    profile = collect_profile(tiny.loaded(tmp_path / "base"), refusing.REFUSALS, progress=False)
    rule = Ridge(strength="auto")
    reports = [
        adjust_model(one, base=tmp_path / "base", profile=profile, rule=rule, progress=False) for one in (model, twin)
    ]
    assert reports[0] == reports[1]
    assert reports[0].search is not None
    assert tiny.same(values(model), values(twin))


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_halfway_restores_every_weight(kind, base, tmp_path, monkeypatch):
    folder = base()
    model = offloaded(kind, tmp_path)
    before, expected = values(model), logits(model)
    profile = collect_profile(tiny.loaded(folder), ROWS, holdout=0.0, progress=False)
    write, written = OffloadedModel.write, []

    def failing(self, name, value):
        write(self, name, value)
        written.append(name)
        if len(written) == 6:
            raise NumericalError("halfway")

    monkeypatch.setattr(OffloadedModel, "write", failing)
    with pytest.raises(NumericalError, match="halfway"):
        adjust_model(model, base=folder, profile=profile, rule=SafeDelta(), progress=False)
    assert len(written) == 12  # as many were put back
    assert tiny.same(values(model), before)
    assert torch.equal(logits(model), expected)


def with_adapter(model):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=adapters.LINEAR, layers_to_transform=[0], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@pytest.mark.parametrize("kind", ["some on disk", "dispatched"])
def test_an_adapter_trained_on_an_offloaded_base_is_the_one_trained_in_memory(kind, tmp_path):
    model, twin = with_adapter(offloaded(kind, tmp_path)), with_adapter(in_memory(tmp_path))
    reports = []
    for number, one in enumerate((model, twin)):
        callback = SafeDeltaCallback(ROWS, RULES["safe_delta"])
        trainer = tiny.trainer(one, callback, tmp_path / f"run{number}")
        trainer.train()
        trainer.save_model(str(tmp_path / f"saved{number}"))
        reports.append(callback.report)
    assert reports[0].parameters == reports[1].parameters
    assert set(reports[0].outcomes) == {"adjusted"}
    saved = [(tmp_path / f"saved{number}" / "adapter_model.safetensors").read_bytes() for number in range(2)]
    assert saved[0] == saved[1]
    profile = collect_profile(model, ROWS, progress=False)
    adjust_adapter(model, profile=profile, rule=RULES["safe_delta"], progress=False)
    adjust_adapter(twin, profile=profile, rule=RULES["safe_delta"], progress=False)
    assert tiny.same(adapters.own_tensors(model), adapters.own_tensors(twin))


@pytest.mark.parametrize("kind", ["some on disk", "one layer on disk"])
def test_layers_trained_beside_frozen_offloaded_ones_end_as_in_memory(kind, tmp_path):
    model, twin = offloaded(kind, tmp_path), in_memory(tmp_path)
    frozen = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    for number, one in enumerate((model, twin)):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(name not in frozen)
        tiny.trainer(one, SafeDeltaCallback(ROWS, RULES["safe_delta"]), tmp_path / f"run{number}").train()
    assert tiny.same(values(model), values(twin))
    assert torch.equal(logits(model), logits(twin))


def test_training_offloaded_weights_stops_before_the_first_step(tmp_path):
    model = offloaded("some on disk", tmp_path)
    trainer = tiny.trainer(model, SafeDeltaCallback(ROWS, RULES["safe_delta"]), tmp_path / "run")
    with pytest.raises(ConfigurationError, match="training does not reach it"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_without_the_callback_the_trainer_says_nothing_of_weights_that_it_does_not_train(tmp_path):
    model = offloaded("some on disk", tmp_path)
    before = values(model)
    frozen = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    trainer: Trainer = tiny.trainer(model, None, tmp_path / "run")
    trainer.train()
    after = values(model)
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
