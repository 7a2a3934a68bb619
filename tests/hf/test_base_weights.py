"""The base of a run is what it started from, in every run that resumes it; or there is an error."""

import pytest

from safedelta_hf import SafeDeltaCallback
from safedelta_hf.errors import BaseWeightsError
from safedelta_hf.hf.base_weights import STATE_KEY
from tests.fixtures import tiny
from tests.fixtures.tiny import loaded
from tests.hf.test_lifecycle import NOTHING_KEPT, ROWS, RULE, is_base


@pytest.fixture
def folder(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resumed(model, callback, output, checkpoint, **settings):
    trainer = tiny.trainer(model, callback, output, save_strategy="epoch", num_train_epochs=3, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@pytest.fixture
def interrupted(folder, tmp_path):
    """A run of three epochs from files; its first checkpoint, and the weights it ended with."""
    model = loaded(folder)
    callback = SafeDeltaCallback(ROWS, RULE)
    tiny.trainer(model, callback, tmp_path / "run", save_strategy="epoch", num_train_epochs=3).train()
    return tmp_path / "run" / "checkpoint-2", tiny.weights(model), callback


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(folder, interrupted, tmp_path):
    checkpoint, expected, first = interrupted
    model, callback = loaded(folder), SafeDeltaCallback(ROWS, RULE)
    trainer = resumed(model, callback, tmp_path / "again", checkpoint)
    assert trainer.state.global_step == 6
    assert tiny.same(tiny.weights(model), expected)
    assert callback.profile.header == first.profile.header and callback.report.base == str(folder)


def test_a_resumed_run_finds_the_base_although_the_model_was_built_otherwise(folder, interrupted, tmp_path):
    checkpoint, expected, _ = interrupted
    model = tiny.perturbed(tiny.llama())
    resumed(model, SafeDeltaCallback(ROWS, RULE), tmp_path / "again", checkpoint)
    assert tiny.same(tiny.weights(model), expected)


@pytest.mark.parametrize("kind", ["folder", "model"])
def test_a_resumed_run_accepts_the_base_that_is_given(folder, interrupted, tmp_path, kind):
    checkpoint, expected, _ = interrupted
    base = folder if kind == "folder" else tiny.llama()
    model = loaded(folder)
    resumed(model, SafeDeltaCallback(ROWS, RULE, base=base), tmp_path / "again", checkpoint)
    assert tiny.same(tiny.weights(model), expected)


def test_a_resumed_run_with_another_base_stops(folder, interrupted, tmp_path):
    checkpoint, _, _ = interrupted
    with pytest.raises(BaseWeightsError, match="not the base that the resumed run started from"):
        resumed(loaded(folder), SafeDeltaCallback(ROWS, base=tiny.perturbed(tiny.llama())), tmp_path / "2", checkpoint)


def test_a_resumed_run_whose_base_files_changed_stops(folder, interrupted, tmp_path):
    checkpoint, _, _ = interrupted
    tiny.perturbed(tiny.llama()).save_pretrained(folder)
    with pytest.raises(BaseWeightsError, match="not the base that the resumed run started from"):
        resumed(loaded(folder), SafeDeltaCallback(ROWS), tmp_path / "again", checkpoint)


def test_a_resumed_run_whose_base_was_in_memory_only_stops_and_accepts_it(tmp_path):
    tiny.trainer(tiny.llama(), SafeDeltaCallback(ROWS), tmp_path / "run", save_strategy="epoch").train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(BaseWeightsError, match="in no file when the run started"):
        resumed(tiny.llama(), SafeDeltaCallback(ROWS), tmp_path / "again", checkpoint)
    model = tiny.llama()
    resumed(model, SafeDeltaCallback(ROWS, NOTHING_KEPT, base=tiny.llama()), tmp_path / "more", checkpoint)
    assert is_base(model)


def test_a_run_resumed_from_before_the_callback_stops_and_accepts_the_base(folder, tmp_path):
    tiny.trainer(loaded(folder), None, tmp_path / "run", save_strategy="epoch").train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(BaseWeightsError, match="trained without this callback"):
        resumed(loaded(folder), SafeDeltaCallback(ROWS), tmp_path / "again", checkpoint)
    model = loaded(folder)
    trainer = resumed(model, SafeDeltaCallback(ROWS, NOTHING_KEPT, base=folder), tmp_path / "more", checkpoint)
    assert is_base(model) and STATE_KEY in trainer.state.stateful_callbacks


def test_restored_callback_states_do_not_replace_the_callback(folder, interrupted, tmp_path):
    checkpoint, expected, _ = interrupted
    model, callback = loaded(folder), SafeDeltaCallback(ROWS, RULE)
    trainer = resumed(model, callback, tmp_path / "again", checkpoint, restore_callback_states_from_checkpoint=True)
    assert callback in trainer.callback_handler.callbacks and callback.report is not None
    assert tiny.same(tiny.weights(model), expected)


def test_a_model_loaded_from_a_checkpoint_is_not_taken_for_a_base(interrupted, tmp_path):
    checkpoint, _, _ = interrupted
    trainer = tiny.trainer(loaded(checkpoint), SafeDeltaCallback(ROWS), tmp_path / "again")
    with pytest.raises(BaseWeightsError, match="a checkpoint of a Trainer"):
        trainer.train()
    model = loaded(checkpoint)
    tiny.trainer(model, SafeDeltaCallback(ROWS, NOTHING_KEPT, base=tiny.llama()), tmp_path / "more").train()
    assert is_base(model)


def test_a_reused_base_is_compared_with_the_checkpoint_that_is_resumed(folder, interrupted, tmp_path):
    checkpoint, _, _ = interrupted
    model, callback = tiny.perturbed(tiny.llama()), SafeDeltaCallback(ROWS)
    trainer = tiny.trainer(model, callback, tmp_path / "again", save_strategy="epoch", num_train_epochs=3)
    trainer.train()
    with pytest.raises(BaseWeightsError, match="not the base that the resumed run started from"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_base_that_was_given_as_a_folder_is_found_again_on_resume(folder, tmp_path):
    start = tiny.perturbed(tiny.llama())
    callback = SafeDeltaCallback(ROWS, RULE, base=folder)
    tiny.trainer(start, callback, tmp_path / "run", save_strategy="epoch", num_train_epochs=3).train()
    model = tiny.llama()
    resumed(model, SafeDeltaCallback(ROWS, RULE), tmp_path / "again", tmp_path / "run" / "checkpoint-2")
    assert tiny.same(tiny.weights(model), tiny.weights(start))


@pytest.mark.parametrize("wrong", ["the model", "another size"])
def test_a_base_that_cannot_be_one_stops_before_training(tmp_path, wrong):
    model = tiny.llama()
    base, message = {
        "the model": (model, "shares its weights"),
        "another size": (tiny.llama(vocab_size=64), r"is \[64, 16\] in a model in memory and \[48, 16\] in the model"),
    }[wrong]
    trainer = tiny.trainer(model, SafeDeltaCallback(ROWS, base=base), tmp_path)
    with pytest.raises(BaseWeightsError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
