"""Runs that are repeated, resumed, restarted or cut short: the base is always the right one, or there is an error."""

import copy
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from safedelta_hf import SafeDelta, SafeDeltaCallback, adjust_model, collect_profile
from tests.fixtures import tiny

ROWS = tiny.rows(24, seed=1)
RULE = SafeDelta(strength=3.0)
NOTHING_KEPT = SafeDelta(strength=0.0)


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
