"""Runs that are repeated, resumed, restarted or cut short: the base is always the right one, or there is an error."""

import copy
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from safedelta_hf import SafeDelta, SafeDeltaCallback, adjust_model, collect_profile
from safedelta_hf.errors import BaseWeightsError, ConfigurationError
from safedelta_hf.hf.base_weights import STATE_KEY
from tests.fixtures import tiny
from tests.fixtures.tiny import loaded

ROWS = tiny.rows(24, seed=1)
RULE = SafeDelta(strength=3.0)
NOTHING_KEPT = SafeDelta(strength=0.0)


@pytest.fixture
def folder(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def is_base(model):
    """With nothing kept, a right base is seen by its weights; unused embedding rows keep their delta."""
    base = tiny.llama()
    return all(torch.equal(p, base.get_parameter(name)) for name, p in model.named_parameters() if "embed" not in name)


def test_a_second_train_measures_the_delta_from_the_first_base(tmp_path):
    model = tiny.llama()
    callback = SafeDeltaCallback(ROWS, NOTHING_KEPT)
    trainer = tiny.trainer(model, callback, tmp_path)
    trainer.train()
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    profile = callback.profile
    trainer.train()
    assert is_base(model) and callback.profile is profile


def test_a_second_trainer_on_the_same_model_may_share_the_callback(tmp_path):
    model, callback = tiny.llama(), SafeDeltaCallback(ROWS, NOTHING_KEPT)
    tiny.trainer(model, callback, tmp_path / "one").train()
    tiny.trainer(model, callback, tmp_path / "two").train()
    assert is_base(model)


def test_another_model_is_another_base(tmp_path):
    callback = SafeDeltaCallback(ROWS, NOTHING_KEPT)
    tiny.trainer(tiny.perturbed(tiny.llama()), callback, tmp_path / "one").train()
    model = tiny.llama()
    tiny.trainer(model, callback, tmp_path / "two").train()
    assert is_base(model)


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


class Fails(TrainerCallback):
    """Stops the run once, at its third step."""

    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.error is not None:
            error, self.error = self.error, None
            raise error


def test_a_restart_with_a_smaller_batch_keeps_the_base(tmp_path):
    model, callback = tiny.llama(), SafeDeltaCallback(ROWS, NOTHING_KEPT)
    begins = []

    class Begins(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            begins.append((state.global_step, is_base(model)))

    trainer = tiny.trainer(model, callback, tmp_path, auto_find_batch_size=True)
    trainer.add_callback(Fails(RuntimeError("CUDA out of memory. Tried to allocate")))
    trainer.add_callback(Begins())
    trainer.train()
    assert begins == [(0, True), (0, False)], "the weights were meant to be half trained at the restart"
    assert is_base(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()])
def test_a_run_that_was_interrupted_may_be_started_again(tmp_path, error):
    model, callback = tiny.llama(), SafeDeltaCallback(ROWS, NOTHING_KEPT)
    trainer = tiny.trainer(model, callback, tmp_path)
    trainer.add_callback(Fails(error))
    with pytest.raises(type(error)):
        trainer.train()
    assert callback.report is None and not is_base(model)
    trainer.train()
    assert is_base(model)


def test_model_init_gives_each_train_its_own_base(tmp_path):
    made = []

    def model_init():
        made.append(tiny.llama())
        return made[-1]

    callback = SafeDeltaCallback(ROWS, NOTHING_KEPT)
    trainer = Trainer(
        model_init=model_init,
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.rows(16, seed=2, length=10),
        callbacks=[callback],
    )
    for _ in range(2):
        trainer.train()
        assert is_base(made[-1])
    assert len({id(model) for model in made}) == len(made) >= 3


def test_pruned_trials_are_not_adjusted_and_do_not_spoil_the_next(tmp_path):
    import optuna

    made, ends = [], []

    class Ends(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            ends.append((state.global_step, state.max_steps, is_base(model)))

    def model_init(trial=None):
        made.append(tiny.llama())
        return made[-1]

    trainer = Trainer(
        model_init=model_init,
        args=tiny.arguments(tmp_path, eval_strategy="epoch", num_train_epochs=3),
        train_dataset=tiny.rows(16, seed=2, length=10),
        eval_dataset=tiny.rows(8, seed=3, length=10),
        callbacks=[SafeDeltaCallback(ROWS, NOTHING_KEPT), Ends()],
    )

    class PruneSecond(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1

    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        n_trials=3,
        backend="optuna",
        pruner=PruneSecond(),
        direction="minimize",
    )
    assert ends == [(6, 6, True), (2, 6, False), (6, 6, True)]


def test_early_stopping_is_not_taken_for_pruning(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    model = tiny.llama()
    trainer = tiny.trainer(model, SafeDeltaCallback(ROWS, NOTHING_KEPT), tmp_path)
    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.state.global_step == 1 and is_base(model)


def test_an_explicit_base_is_measured_from_although_training_starts_elsewhere(tmp_path):
    start = tiny.perturbed(tiny.llama())
    model = copy.deepcopy(start)
    callback = SafeDeltaCallback(ROWS, RULE, base=tiny.llama())
    tiny.trainer(model, callback, tmp_path / "one").train()
    reference = copy.deepcopy(start)
    tiny.trainer(reference, None, tmp_path / "two").train()
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    adjust_model(reference, base=tiny.llama(), profile=profile, rule=RULE, progress=False)
    assert tiny.same(tiny.weights(model), tiny.weights(reference))
    assert callback.profile.header == profile.header


def test_training_starts_from_its_own_weights_although_a_base_is_given(tmp_path):
    keep_all = SafeDelta(strength=math.inf, exclude_top=0.0)
    model, reference = tiny.perturbed(tiny.llama()), tiny.perturbed(tiny.llama())
    tiny.trainer(model, SafeDeltaCallback(ROWS, keep_all, base=tiny.llama()), tmp_path / "one").train()
    tiny.trainer(reference, None, tmp_path / "two").train()
    assert tiny.same(tiny.weights(model), tiny.weights(reference))


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
