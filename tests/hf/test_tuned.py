"""The fine-tuned weights are kept before they are adjusted, never over something else, and come back bit for bit."""

import pytest
from transformers import Trainer

from safedelta_hf import Ridge, SafeDelta, SafeDeltaCallback, Scale, adjust_adapter, adjust_model
from safedelta_hf.errors import AdjustmentError, ConfigurationError, NumericalError
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
