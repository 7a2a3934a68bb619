"""Facts about a training run, read off what the Trainer passes to its callbacks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from safedelta_hf.errors import AdjustmentError, ConfigurationError, SafeDeltaError
from safedelta_hf.ranks import Ranks


def bare(model: nn.Module | None) -> nn.Module:
    """The model without what `torch.compile` wraps around it.

    Args:
        model: As the callback received it.

    Returns:
        The module that holds the parameters.

    Raises:
        ConfigurationError: There is none.
    """
    if model is None:
        raise ConfigurationError("SafeDeltaCallback: the Trainer passed no model")
    bare: nn.Module = getattr(model, "_orig_mod", model)
    return bare


def trained_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that is being trained.

    Args:
        model: The bare model.

    Returns:
        Its name, or None if the model has no adapters.

    Raises:
        ConfigurationError: Several adapters are active at once.
    """
    if not getattr(model, "peft_config", None):
        return None
    active: Any = model.active_adapters
    names = active() if callable(active) else active
    if len(names) != 1:
        raise ConfigurationError(
            f"SafeDeltaCallback: adjusts one adapter, and {len(names)} are active: {names}; activate the one that is "
            "trained with set_adapter(name)"
        )
    return str(names[0])


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


@contextmanager
def foreign_errors_named(stage: str) -> Iterator[None]:
    """Turn what other libraries raise into an error of ours; a `RuntimeError` would make Trainer train again.

    Args:
        stage: What is being done.

    Yields:
        Nothing.

    Raises:
        AdjustmentError: Something else than an error of ours was raised.
        SafeDeltaError: As it was raised.
    """
    try:
        yield
    except SafeDeltaError:
        raise
    except Exception as error:
        raise AdjustmentError(f"{type(error).__name__} while {stage}; the weights are as they were") from error
