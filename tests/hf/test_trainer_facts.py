"""Facts of a run are read off what a Trainer passes, and off nothing else."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.hf.trainer_facts import (
    close_training_bar,
    is_pruned,
    log_metrics,
    output_dir,
    require_supported,
    shows_progress,
    trainer_of,
    trains_dense,
)


def test_processes_that_torch_does_not_know_are_refused():
    with pytest.raises(ConfigurationError, match="8 processes, of which torch.distributed knows 1"):
        require_supported(SimpleNamespace(world_size=8))


def state(**changes):
    return TrainerState(**{"global_step": 3, "max_steps": 9, "is_hyper_param_search": True} | changes)


def control(stops):
    return TrainerControl(should_training_stop=stops)


@pytest.mark.parametrize(
    ("changes", "stops", "pruned"),
    [
        ({}, False, True),
        ({}, True, False),  # somebody asked for it, as early stopping does
        ({"global_step": 9}, False, False),
        ({"is_hyper_param_search": False}, False, False),
    ],
)
def test_a_trial_is_pruned_if_it_ends_before_its_last_step_and_nobody_asked(changes, stops, pruned):
    assert is_pruned(state(**changes), control(stops)) is pruned


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("disabled", [True, False])
def test_the_main_process_alone_shows_progress_and_only_if_wanted(main, disabled):
    shown = shows_progress(SimpleNamespace(disable_tqdm=disabled), state(is_world_process_zero=main))
    assert shown is (main and not disabled)


def test_a_trainer_without_a_folder_writes_where_it_runs():
    assert output_dir(SimpleNamespace(output_dir=None)) == Path()
    assert output_dir(SimpleNamespace(output_dir="there")) == Path("there")


class Heard(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


class ProgressCallback(Heard):
    """Prints what it hears, as its name says."""


def called_by(*callbacks):
    return SimpleNamespace(callback_handler=CallbackHandler(callbacks, nn.Identity(), None, None, None))


@pytest.mark.parametrize("epoch", [None, 2.0])
def test_metrics_reach_the_history_and_every_callback(epoch):
    heard, prints, now = Heard(), ProgressCallback(), state(epoch=epoch)
    trainer = called_by(heard, prints)
    log_metrics({"loss": 1.0}, trainer, None, now, control(False))
    logs = {"loss": 1.0} | ({} if epoch is None else {"epoch": epoch})
    assert heard.logs == prints.logs == [logs] and now.log_history == [logs | {"step": 3}]
    log_metrics({"loss": 1.0}, trainer, None, now, control(False), printed=False)
    assert len(heard.logs) == 2 and len(prints.logs) == 1 and len(trainer.callback_handler.callbacks) == 2


@pytest.mark.parametrize("main", [True, False])
def test_without_a_trainer_metrics_go_to_the_history_alone(monkeypatch, main):
    warnings, now = [], state(is_world_process_zero=main)
    monkeypatch.setattr("safedelta_hf.hf.trainer_facts.logger.warning", warnings.append)
    assert trainer_of(now) is None
    log_metrics({"loss": 1.0}, None, None, now, control(False))
    assert now.log_history[0]["loss"] == 1.0 and ["not called by a Trainer" in one for one in warnings] == [True] * main


def test_the_bar_of_a_training_is_closed_before_another_is_drawn():
    closed = []
    bar = SimpleNamespace(training_bar=SimpleNamespace(close=lambda: closed.append(True)))
    close_training_bar(SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[Heard(), bar])))
    assert closed == [True]


def test_an_adapter_trains_nothing_dense_and_a_whole_model_all_that_is_here_whole():
    model = nn.Linear(2, 2)
    opened = SimpleNamespace(
        model=model, names=("weight", "bias"), shard=lambda name: SimpleNamespace(is_whole=name == "weight")
    )
    assert [trains_dense(opened)(name) for name in ("weight", "bias", "computed")] == [True, False, True]
    model.peft_config, model.active_adapters = {"one": None}, ["one"]
    assert not any(trains_dense(opened)(name) for name in ("weight", "bias", "computed"))
