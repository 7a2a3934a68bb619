"""Facts about a training run, read off what the Trainer passes to its callbacks, and the way to its log."""

import copy
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, Final

from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging

from safedelta_hf.adapter.adjust import plan_adapter
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import ConfigurationError, warn
from safedelta_hf.model.adjust import plan_model
from safedelta_hf.modules.adapters import trained_adapter, tuner_layers
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.plan import PlanEntry, Treatment
from safedelta_hf.report.provenance import restore_card

logger = logging.get_logger(__name__)

OWNER = "SafeDeltaCallback"
"""Whose run it is, for errors."""


def output_dir(args: TrainingArguments) -> Path:
    """Where the Trainer writes.

    Args:
        args: Of the Trainer.

    Returns:
        A folder, which may not exist yet.
    """
    return Path(args.output_dir or ".")


def shows_progress(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether this process shows progress bars.

    Args:
        args: Of the Trainer.
        state: Of the Trainer.

    Returns:
        Whether it is the main process and they were not switched off.
    """
    return state.is_world_process_zero and not args.disable_tqdm


def is_pruned(state: TrainerState, control: TrainerControl) -> bool:
    """Whether a training ends because a hyper-parameter search gave it up.

    Args:
        state: Of the Trainer.
        control: Of the Trainer.

    Returns:
        Whether it ends before its last step although nobody asked for a stop.
    """
    # `on_train_end` fires for a pruned trial too; then the trial is abandoned.
    return state.is_hyper_param_search and state.global_step < state.max_steps and not control.should_training_stop


def require_supported(args: TrainingArguments) -> None:
    """Stop where the processes of a run could not find one another.

    Args:
        args: Of the Trainer.

    Raises:
        ConfigurationError: They are not those of `torch.distributed`.
    """
    size = Ranks.of_run().size
    if args.world_size != size:
        raise ConfigurationError(
            f"SafeDeltaCallback: this run has {args.world_size} processes, of which torch.distributed knows {size}; "
            "start it with torchrun or accelerate launch, or train without the callback and use adjust_checkpoint"
        )


def require_fetched_adapters(model: ShardedModel) -> None:
    """Stop where the first step would fail: PEFT would compute with factors of an adapter that FSDP1 has not gathered.

    Args:
        model: The model that will be trained.

    Raises:
        ConfigurationError: An adapter is on a parameter, not on a layer, and its factors are units of FSDP1.
    """
    if not getattr(model.model, "peft_config", None):
        return
    from peft.tuners.lora.layer import ParamWrapper

    for layer in tuner_layers(model.model):
        if isinstance(layer, ParamWrapper) and FullyShardedDataParallel.fsdp_modules(layer.lora_A):
            raise ConfigurationError(
                f"{layer.parameter_name}: PEFT computes with an adapter on a parameter (target_parameters, as of fused "
                "experts) without calling the layers of its factors, and FSDP1 gathers them when they are called, so "
                "training fails (https://github.com/huggingface/peft/issues/3080). Use FSDP2 (fsdp_config "
                '{"version": 2}), or target_modules without experts and routers, such as ["q_proj", "v_proj"]'
            )


def warn_of_empty_adapters(model: ShardedModel) -> None:
    """Warn where the Trainer would save nothing of what is trained.

    Args:
        model: The model that will be trained.
    """
    # PEFT looks for the adapter under the names of modules, and FSDP1's units are part of those.
    if model.kind == "FSDP1" and getattr(model.model, "peft_config", None) and model.ranks.is_main:
        warn(
            "under FSDP1, PEFT finds no tensor of an adapter: trainer.save_model() writes an empty one, or waits for "
            "ever where there are modules_to_save. Use FSDP2, or keep_tuned=<folder>, which holds the whole tuned "
            "adapter, and adjust_adapter_files() on that folder, with callback.profile"
        )


_PRINTING: Final = ("PrinterCallback", "ProgressCallback")
"""How the names of callbacks end that print what is logged."""


def trainer_of(state: TrainerState) -> Trainer | None:
    """The Trainer that a state belongs to: callbacks are not given theirs.

    Args:
        state: As a callback received it.

    Returns:
        The Trainer; None where something else calls the callbacks.
    """
    # Classes are asked, not objects, of which some are proxies that would import something.
    trainers = (found for found in gc.get_objects() if issubclass(type(found), Trainer))
    return next((found for found in trainers if getattr(found, "state", None) is state), None)


def put_before_trackers(callback: TrainerCallback, trainer: Trainer) -> None:
    """Let the trackers of a run close after a callback has logged at the end of training.

    Safe while callbacks are called in turn: what comes after this one keeps its place.

    Args:
        callback: Of the Trainer.
        trainer: Its list of callbacks is changed.
    """
    callbacks, trackers = trainer.callback_handler.callbacks, tuple(INTEGRATION_TO_CALLBACK.values())
    if callback in callbacks:
        place = callbacks.index(callback)
        before = callbacks[:place]
        moved = [one for one in before if isinstance(one, trackers)]
        callbacks[: place + 1] = [*(one for one in before if one not in moved), callback, *moved]


def close_training_bar(trainer: Trainer) -> None:
    """Let the bar of a training that has ended go, so that no other is drawn below it.

    Args:
        trainer: The Trainer.
    """
    for callback in trainer.callback_handler.callbacks:
        if (bar := getattr(callback, "training_bar", None)) is not None and hasattr(bar, "close"):
            bar.close()


def keep_card_section(trainer: Trainer) -> None:
    """Let the cards that a Trainer writes keep what the folder says of the adjustment.

    Args:
        trainer: Its `create_model_card` is replaced, on this object alone.
    """
    if "create_model_card" in vars(trainer):
        return
    write = type(trainer).create_model_card

    @functools.wraps(write)
    def create_model_card(self: Trainer, *args: Any, **settings: Any) -> None:  # noqa: ANN401
        write(self, *args, **settings)
        if self.is_world_process_zero():
            restore_card(output_dir(self.args))

    trainer.create_model_card = MethodType(create_model_card, trainer)  # type: ignore[method-assign]


def log_metrics(
    metrics: dict[str, float],
    trainer: Trainer | None,
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    *,
    printed: bool = True,
) -> None:
    """Log as `Trainer.log` does: into `state.log_history`, and to every callback's `on_log`.

    Args:
        metrics: Scalars by name.
        trainer: The Trainer; None where something else calls the callbacks.
        args: As the callback received them.
        state: As the callback received it; its history grows by one entry.
        control: As the callback received it.
        printed: Whether callbacks that print what is logged are told as well.
    """
    logs = dict(metrics) if state.epoch is None else {**metrics, "epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    if trainer is None:
        if state.is_world_process_zero:
            logger.warning("Safe Delta: not called by a Trainer, so its metrics go to state.log_history alone.")
        return
    handler = copy.copy(trainer.callback_handler)
    if not printed:
        handler.callbacks = [one for one in handler.callbacks if not type(one).__name__.endswith(_PRINTING)]
    handler.on_log(args, state, control, logs)


def entries_of_trained(model: ShardedModel, profile: SafetyProfile, treatment: Treatment) -> list[PlanEntry]:
    """Plan what a run trains, before it trains it.

    Args:
        model: The model, with or without an adapter.
        profile: Profile of its base.
        treatment: What to do with parameters other than linear weights.

    Returns:
        One entry for each trained parameter.
    """
    adapter = trained_adapter(model.model, OWNER)
    if adapter is not None:
        return list(plan_adapter(model, profile, treatment, adapter).entries)
    trained = {name for name in model.names if model.live(name).requires_grad}
    entries = plan_model(model, profile, treatment).entries
    return [entry for entry in entries if not trained.isdisjoint((entry.parameter, *entry.originals))]


def trains_dense(model: ShardedModel) -> Callable[[str], bool]:
    """Whether base and fine-tuned weight of a parameter will be at hand, whole, as far as merges need to know.

    Args:
        model: The model, with or without an adapter.

    Returns:
        Whether they will, by canonical name; False for all that an adapter tunes.
    """
    is_adapted, own = trained_adapter(model.model, OWNER) is not None, frozenset(model.names)
    return lambda name: not is_adapted and (name not in own or model.shard(name).is_whole)
