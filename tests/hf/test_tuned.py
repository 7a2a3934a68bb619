"""The fine-tuned weights are kept before they are adjusted, never over something else, and come back bit for bit."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, Trainer, TrainerState

from safedelta_hf import Ridge, SafeDelta, SafeDeltaCallback, Scale, adjust_adapter, adjust_model
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import AdjustmentError, CheckpointError, ConfigurationError, NumericalError, RestoreError
from safedelta_hf.hf.base_weights import STATE_KEY
from safedelta_hf.hf.tuned import (
    RUN_FILE,
    TunedWeights,
    require_room_for_tuned,
    rescue_tuned,
    save_tuned,
    whereabouts,
)
from tests.fixtures import adapters, refusing, tiny
from tests.fixtures.tiny import loaded
from tests.hf.test_precision import NUMBER, trained, with_lora

ROWS = tiny.rows(24, seed=1)
RULE = SafeDelta(strength=3.0)


def test_keep_tuned_is_refused_in_a_search(tmp_path):
    callback = SafeDeltaCallback(ROWS, keep_tuned=tmp_path / "tuned")
    trainer = Trainer(
        model_init=lambda trial=None: tiny.llama(),
        args=tiny.arguments(tmp_path / "run"),
        train_dataset=tiny.rows(16, seed=2, length=10),
        eval_dataset=tiny.rows(8, seed=3, length=10),
        callbacks=[callback],
    )
    with pytest.raises(ConfigurationError, match="leave it out of the search"):
        trainer.hyperparameter_search(hp_space=lambda trial: {}, n_trials=1, backend="optuna")


def test_keep_tuned_holds_the_weights_before_the_adjustment(tmp_path):
    model = tiny.llama()
    tiny.trainer(model, SafeDeltaCallback(ROWS, RULE, keep_tuned=tmp_path / "tuned"), tmp_path / "run").train()
    plain = tiny.llama()
    tiny.trainer(plain, None, tmp_path / "plain").train()
    assert tiny.same(tiny.weights(loaded(tmp_path / "tuned")), tiny.weights(plain))


def test_an_adapter_that_transformers_loaded_is_saved_as_it_was(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    adapters.adapted(loaded(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    save_tuned(model, None, tmp_path / "tuned", TrainerState())
    expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tiny.same(load_file(tmp_path / "tuned" / "adapter_model.safetensors"), expected)
    assert PeftModel.from_pretrained(tiny.llama(), tmp_path / "tuned").peft_config["default"].r == 4


def test_a_place_where_nothing_can_be_kept_is_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    callback = SafeDeltaCallback(ROWS, RULE, keep_tuned=tmp_path / "file" / "tuned")
    trainer = tiny.trainer(tiny.llama(), callback, tmp_path / "run")
    with pytest.raises(ConfigurationError, match="keep_tuned: .*cannot be written"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_keep_tuned_never_overwrites(tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "model.safetensors").write_text("precious")
    trainer = tiny.trainer(tiny.llama(), SafeDeltaCallback(ROWS, keep_tuned=tmp_path / "tuned"), tmp_path / "run")
    with pytest.raises(ConfigurationError, match="exists already"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert (tmp_path / "tuned" / "model.safetensors").read_text() == "precious"


def test_tuned_weights_that_cannot_be_kept_are_rescued_elsewhere(tmp_path, monkeypatch):
    from safedelta_hf.hf import callback as module

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_tuned", full)
    model = tiny.llama()
    with pytest.raises(AdjustmentError, match="OSError while saving the tuned weights") as raised:
        tiny.trainer(model, SafeDeltaCallback(ROWS, keep_tuned=tmp_path / "tuned"), tmp_path / "run").train()
    rescued = tmp_path / "run" / "tuned-not-adjusted-4-1"
    assert str(rescued) in raised.value.__notes__[0]
    assert tiny.same(tiny.weights(loaded(rescued)), tiny.weights(model))


def below_wrappers(model):
    """Activation checkpointing, as accelerate puts it around layers."""
    layers = model.base_model.model.model.layers
    layers[1] = checkpoint_wrapper(layers[1])
    return model


def test_an_adapter_below_wrappers_is_saved_as_without_them(tmp_path):
    plain = with_lora(refusing.base())
    save_tuned(plain, None, tmp_path / "plain", TrainerState())
    save_tuned(below_wrappers(plain), None, tmp_path / "wrapped", TrainerState())
    wanted, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "wrapped"))
    assert len(wanted) == sum(parameter.requires_grad for parameter in plain.parameters())
    assert tiny.same(wanted, found)


def test_an_adapter_of_which_tensors_would_be_missing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("safedelta_hf.hf.tuned.without_wrappers", nullcontext)
    with pytest.raises(CheckpointError, match=r"^tuned: the adapters have \d+ trained tensors, and PEFT saved \d+"):
        save_tuned(below_wrappers(with_lora(refusing.base())), None, tmp_path / "tuned", TrainerState())
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_adjusted_again_from_its_tuned_weights(tmp_path):
    plain, model = with_lora(refusing.base()), with_lora(refusing.base())
    trained(plain, None, tmp_path / "plain")
    callback = SafeDeltaCallback(refusing.REFUSALS, Scale(strength=0.0))
    trained(model, callback, tmp_path / "run")
    adjusted = adapters.own_tensors(model)
    report = callback.adjust(model, rule=NUMBER, progress=False)
    expected = adjust_adapter(plain, profile=callback.profile, rule=NUMBER, progress=False)
    assert report.parameters == expected.parameters
    assert tiny.same(adapters.own_tensors(model), adapters.own_tensors(plain))
    callback.adjust(model, progress=False)  # the callback's own rule again
    assert tiny.same(adapters.own_tensors(model), adjusted)


def test_a_whole_model_is_adjusted_again_from_the_folder_that_keeps_it(tmp_path, monkeypatch):
    plain, model = refusing.base(), refusing.base()
    trained(plain, None, tmp_path / "plain")
    callback = SafeDeltaCallback(refusing.REFUSALS, Scale(strength=0.5), keep_tuned=tmp_path / "tuned")
    trained(model, callback, tmp_path / "run")
    adjusted = tiny.weights(model)
    with monkeypatch.context() as patched, pytest.raises(NumericalError):
        patched.setattr(Ridge, "factorise", broken)
        callback.adjust(model, rule=NUMBER, progress=False)
    assert tiny.same(tiny.weights(model), adjusted)
    callback.adjust(model, rule=NUMBER, progress=False)
    adjust_model(plain, base=refusing.base(), profile=callback.profile, rule=NUMBER, progress=False)
    assert tiny.same(tiny.weights(model), tiny.weights(plain))


def broken(*_):
    raise NumericalError("broken")


def test_tuned_weights_that_were_not_kept_are_a_named_error(tmp_path):
    model = refusing.base()
    callback = SafeDeltaCallback(refusing.REFUSALS, NUMBER)
    trained(model, callback, tmp_path)
    adjusted = tiny.weights(model)
    with pytest.raises(ConfigurationError, match="keep_tuned=<folder>"):
        callback.adjust(model, rule=NUMBER, progress=False)
    assert tiny.same(tiny.weights(model), adjusted)


def named(name="one", **changes):
    record = {} if name is None else {STATE_KEY: {"run": name}}
    return TrainerState(**{"global_step": 4, "stateful_callbacks": record} | changes)


def test_there_is_room_in_no_folder_an_empty_one_and_that_of_the_same_run(tmp_path):
    folder = tmp_path / "tuned"
    require_room_for_tuned(None, named(is_hyper_param_search=True))
    require_room_for_tuned(folder, named())
    folder.mkdir()
    require_room_for_tuned(folder, named())
    save_tuned(nn.Linear(2, 2), None, folder, named("one"))
    require_room_for_tuned(folder, named("one"))
    for other in (named("two"), named(None)):
        with pytest.raises(ConfigurationError, match="exists already"):
            require_room_for_tuned(folder, other)
    with pytest.raises(ConfigurationError, match="leave it out of the search"):
        require_room_for_tuned(folder, named(is_hyper_param_search=True))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="exists already"):
        require_room_for_tuned(tmp_path / "file", named())


def test_the_same_run_writes_its_weights_again_as_a_whole(tmp_path):
    folder, one, other = tmp_path / "tuned", nn.Linear(2, 2), nn.Linear(2, 2)
    save_tuned(one, None, folder, named())
    (folder / "stale").touch()
    save_tuned(other, None, folder, named())
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", RUN_FILE}
    assert load_file(folder / "model.safetensors")["weight"].equal(other.weight)
    with pytest.raises(OSError, match="not empty"):
        save_tuned(one, None, folder, named("two"))
    assert load_file(folder / "model.safetensors")["weight"].equal(other.weight)


def test_rescued_weights_never_replace_those_rescued_before(tmp_path):
    models = [nn.Linear(2, 2) for _ in range(3)]
    said = [rescue_tuned(model, None, tmp_path, named()) for model in models]
    for number, (model, sentence) in enumerate(zip(models, said, strict=True), 1):
        folder = tmp_path / f"tuned-not-adjusted-4-{number}"
        assert str(folder) in sentence and "saved in" in sentence
        assert load_file(folder / "model.safetensors")["weight"].equal(model.weight)


def test_a_rescue_that_fails_is_told_and_not_raised(tmp_path):
    (tmp_path / "file").touch()
    assert "could not be saved" in rescue_tuned(nn.Linear(2, 2), None, tmp_path / "file", named())


def test_what_is_said_of_the_weights_is_so(tmp_path):
    model, alone = nn.Linear(2, 2), NumericalError("alone")
    alone._safedelta_alone = True
    mixed = RestoreError("mixed")

    def said(error, saved):
        return whereabouts(error, saved, model, None, tmp_path, named())

    assert "unharmed in the model, and saved in" in said(NumericalError("it"), tmp_path / "kept")
    assert "unharmed" not in said(mixed, tmp_path / "kept") and "kept" in said(mixed, tmp_path / "kept")
    assert "in the last checkpoint" in said(mixed, None) and "in the last checkpoint" in said(alone, None)
    assert not list(tmp_path.iterdir())
    assert "tuned-not-adjusted-4-1" in said(NumericalError("it"), None)


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_trained_comes_back_and_what_was_frozen_stays(fails, tmp_path):
    model = tiny.Plain()
    model.embed.requires_grad_(False)
    opened = open_model(model)
    tuned, kept = tiny.weights(model), TunedWeights(opened, None, is_adapter=True)
    adjusted = tiny.weights(tiny.perturbed(model))
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), kept.put_back(opened, tmp_path):
        inside = tiny.weights(model)
        assert tiny.same(inside, tuned | {"embed.weight": adjusted["embed.weight"]})
        if fails:
            raise ZeroDivisionError
    assert tiny.same(tiny.weights(model), adjusted if fails else inside)


def test_tuned_weights_are_those_of_one_model_and_hold_it_no_longer_than_others_do():
    model = nn.Linear(2, 2)
    kept = TunedWeights(open_model(model), None, is_adapter=False)
    assert kept.is_of(open_model(model)) and not kept.is_of(open_model(copy.deepcopy(model)))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
