"""The fine-tuned weights on disk, before they are adjusted."""

import sys
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import TrainerState
from transformers.utils.hub import PushToHubMixin

from safedelta_hf.capture.safety_data import ProcessingClass
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.folders import complete_or_absent
from safedelta_hf.names import unwrapped_shards
from safedelta_hf.sharding.held import HeldModel
from safedelta_hf.sharding.whole import WholeParameters
from safedelta_hf.weights.state import gathered_state


def require_room_for_tuned(folder: Path | None, state: TrainerState) -> None:
    """Stop before training if the tuned weights could not be saved after it.

    Args:
        folder: Where they are to be saved; None if they are not.
        state: Of the Trainer.

    Raises:
        ConfigurationError: The folder is not free, or there will be several models.
    """
    if folder is None:
        return
    if state.is_hyper_param_search:
        raise ConfigurationError(
            "SafeDeltaCallback: keep_tuned names one folder, and a hyper-parameter search has many trials; leave "
            "it out of the search"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(
            f"SafeDeltaCallback: keep_tuned={str(folder)!r} exists already; remove it or choose another folder"
        )


def save_tuned(model: nn.Module, processing_class: ProcessingClass | None, folder: Path) -> None:
    """Write a model as it is now; complete or not there at all.

    Where it is sharded, all ranks call this; the main one brings the weights together in host memory and writes.

    Args:
        model: A transformers model; a `PeftModel`, whose adapters are written; or any module, then only
            `model.safetensors` is written.
        processing_class: Tokenizer or processor to save beside it, or None.
        folder: A folder that does not exist, or is empty.
    """
    held = HeldModel.of(model)
    with held.ranks.together():
        state = None
        if type(held.holding) is not WholeParameters:
            state = gathered_state(held, but=held.names if _carries_adapters_alone(model) else ())
        if held.ranks.is_main:
            _save(unwrapped_shards(model), state, processing_class, folder)


def _save(
    model: nn.Module, state: dict[str, Tensor] | None, processing_class: ProcessingClass | None, folder: Path
) -> None:
    with complete_or_absent(folder) as unfinished:
        if isinstance(model, PushToHubMixin):
            model.save_pretrained(unfinished, state_dict=state)  # type: ignore[no-untyped-call]
        elif state is None:
            save_model(model, str(unfinished / "model.safetensors"))
        else:
            save_torch_state_dict(state, unfinished, max_shard_size=sys.maxsize)
        if processing_class is not None:
            processing_class.save_pretrained(unfinished)


def _carries_adapters_alone(model: nn.Module) -> bool:
    configs = getattr(model, "peft_config", {}) or {}
    return bool(configs) and all(getattr(config, "bias", "none") == "none" for config in configs.values())


def rescue_tuned(model: nn.Module, processing_class: ProcessingClass | None, output_dir: Path, step: int) -> str:
    """Save the tuned weights after the adjustment failed, under a name that is still free.

    Args:
        model: The tuned model.
        processing_class: Tokenizer or processor to save beside it, or None.
        output_dir: Where to make the folder.
        step: Step at which training ended.

    Returns:
        A sentence on where they are.
    """
    number = 1
    while (folder := output_dir / f"tuned-not-adjusted-{step}-{number}").exists():
        number += 1
    try:
        save_tuned(model, processing_class, folder)
    except Exception as error:  # the adjustment's own error is the one to raise
        return f"The tuned weights are unharmed in the model, but could not be saved in {str(folder)!r}: {error}"
    return f"The tuned weights are unharmed in the model, and saved in {str(folder)!r}."
