"""The Trainer of a polish: the loss of distillation, and arguments derived from those of the fine-tuning."""

import copy
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from typing_extensions import override

from safedelta_hf.data.batches import arguments_for
from safedelta_hf.data.predictions import response_logits
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.modules.evaluating import random_state_kept
from safedelta_hf.modules.names import unwrapped
from safedelta_hf.polish.config import PolishConfig
from safedelta_hf.polish.lessons import Lessons, batch_loss, collated, curriculum

SUPPORTED: Final = ("whole", "FSDP2", "FSDP1")
"""Ways of holding a model that a second Trainer can train, as they are, after the first one has."""


class PolishTrainer(Trainer):
    """A Trainer whose loss is the divergence from the teachers of its rows."""

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        labels = inputs["labels"]
        output = model(**arguments_for(model, inputs["input_ids"], inputs["attention_mask"], labels))
        loss = batch_loss(response_logits(model, output, labels), inputs)
        return (loss, output) if return_outputs else loss


def require_polishable(args: TrainingArguments, model: ShardedModel, owner: str) -> None:
    """Stop where a second Trainer could not go on with the model of the first.

    Args:
        args: Of the fine-tuning.
        model: The model.
        owner: Whose argument the polish is, for the error.

    Raises:
        ConfigurationError: It could not; with the reason.
    """
    reasons = {
        f"under {model.kind}": model.kind not in SUPPORTED,
        "under DeepSpeed": args.deepspeed is not None,
        "under nn.DataParallel (start it with torchrun instead)": args.n_gpu > 1,
        "with parallelism_config (tensor, context or sequence parallelism)": args.parallelism_config is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigurationError(
                f"{owner}: polish trains the adjusted model with a second Trainer, which does not work {reason}; train "
                "in one process, with DDP, FSDP2 or FSDP1, or call polish_model on the saved model"
            )


def trained(
    model: ShardedModel, lessons: Lessons, args: TrainingArguments, config: PolishConfig, steps: int, *, progress: bool
) -> None:
    """Train a model on lessons, in place.

    Args:
        model: The adjusted model.
        lessons: What it learns.
        args: Of the fine-tuning, from which those of the polish are derived.
        config: Settings.
        steps: Number of optimiser steps.
        progress: Whether to show a progress bar.
    """
    kinds = sum(1 for rows in lessons.taught.values() if rows)
    own = arguments_for_polish(args, config, steps, kinds, progress=progress)
    items = steps * own.per_device_train_batch_size * own.gradient_accumulation_steps * max(1, own.world_size)
    with _undisturbed(model):
        trainer = PolishTrainer(
            model=model.runnable,
            args=own,
            train_dataset=curriculum(lessons.taught, items),
            data_collator=collated,
        )
        trainer.remove_callback(PrinterCallback)
        # The loss is a mean over the rows of a micro-batch, which the Trainer then averages.
        trainer.model_accepts_loss_kwargs = False
        trainer.train()


OWN: Final[Mapping[str, Any]] = {
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {},
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "label_names": ["log_probs"],
    "remove_unused_columns": False,
    "train_sampling_strategy": "random",
    "dataloader_drop_last": False,
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
    "ignore_data_skip": False,
    "auto_find_batch_size": False,
    "label_smoothing_factor": 0.0,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "enable_jit_checkpoint": False,
    "logging_strategy": "no",
    "logging_first_step": False,
    "include_num_input_tokens_seen": "no",
    "report_to": [],
    "push_to_hub": False,
    # These are on the model already.
    "activation_checkpointing": False,
    "gradient_checkpointing": False,
    "use_liger_kernel": False,
    "neftune_noise_alpha": None,
}
"""Arguments that a polish does not take from the fine-tuning: plain cosine training on rows that are ready, which
writes, evaluates and reports nothing."""


def arguments_for_polish(
    args: TrainingArguments, config: PolishConfig, steps: int, kinds: int, *, progress: bool
) -> TrainingArguments:
    """Arguments of the polish: the run's precision, optimiser, seeds and way of distribution, and nothing written.

    Args:
        args: Of the fine-tuning; left as they are.
        config: Settings.
        steps: Number of optimiser steps.
        kinds: Number of rows of an item: one of each kind.
        progress: Whether to show a progress bar.

    Returns:
        New arguments; a batch holds items.
    """
    # A row of each kind makes an item; no more rows are in a device's memory than in the fine-tuning.
    wanted = math.ceil(config.batch_size / max(1, args.world_size))
    room = max(1, args.per_device_train_batch_size // kinds)
    accumulation = math.ceil(wanted / min(room, wanted))
    changes: Mapping[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": math.ceil(wanted / accumulation),
        "gradient_accumulation_steps": accumulation,
        "learning_rate": args.learning_rate * config.rate,
        "disable_tqdm": not progress,
        "accelerator_config": AcceleratorConfig(),
    }
    own = copy.copy(args)  # to make them anew would read the environment again, as of FSDP's settings
    for name, value in {**copy.deepcopy(OWN), **changes}.items():
        setattr(own, name, value)
    return own


_PREPARED: Final[tuple[str, ...]] = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What accelerate puts on a module that it prepares."""


@contextmanager
def _undisturbed(model: ShardedModel) -> Iterator[None]:
    """Leave everything but weights as it was: modes, noise, random states, and what accelerate puts on a module."""
    bare = model.runnable
    before = {name: vars(bare)[name] for name in _PREPARED if name in vars(bare)}
    modes = {module: module.training for module in bare.modules()}
    noisy = [module for module in bare.modules() if hasattr(module, "neftune_noise_alpha")]
    config: Any = getattr(unwrapped(bare), "config", None)
    states = random.getstate(), np.random.get_state()
    with ExitStack() as after:
        after.enter_context(random_state_kept(bare))
        after.callback(random.setstate, states[0])
        after.callback(np.random.set_state, states[1])
        if hasattr(config, "use_cache"):
            after.callback(setattr, config, "use_cache", config.use_cache)
        for module in noisy:
            after.callback(setattr, module, "neftune_noise_alpha", module.neftune_noise_alpha)
            vars(module)["neftune_noise_alpha"] = 0.0
        after.callback(_put_back, bare, before, modes)
        after.enter_context(_checkpointed_once())
        yield


def _put_back(model: nn.Module, prepared: Mapping[str, Any], modes: Mapping[nn.Module, bool]) -> None:
    for name in _PREPARED:
        vars(model).pop(name, None)
    vars(model).update(prepared)
    for module, flag in modes.items():
        module.training = flag
    model.zero_grad()


@contextmanager
def _checkpointed_once() -> Iterator[None]:
    # FSDP2's own activation checkpointing would be put around layers that have it.
    plugin = getattr(AcceleratorState(), "fsdp_plugin", None) if AcceleratorState._shared_state else None
    if plugin is None or not plugin.activation_checkpointing:
        yield
        return
    try:
        plugin.activation_checkpointing = False
        yield
    finally:
        plugin.activation_checkpointing = True
