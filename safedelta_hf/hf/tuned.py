"""The fine-tuned weights as they were before they are adjusted."""

import json
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from transformers import TrainerState
from transformers.utils.hub import PushToHubMixin

from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.distributed.ranks import Ranks, is_shared
from safedelta_hf.errors import CheckpointError, ConfigurationError, OutputError, RestoreError, SafeDeltaError
from safedelta_hf.folders import complete_or_absent, require_writable
from safedelta_hf.hf.base_weights import name_of_run
from safedelta_hf.modules.adapters import active_adapters
from safedelta_hf.modules.names import ADAPTER_PREFIX, embeddings, without_wrappers
from safedelta_hf.weights.journal import Journal
from safedelta_hf.weights.readers import open_base

RUN_FILE = "safedelta_run.json"
"""Says in the folder of the tuned weights which run it is of, so that the same run, resumed, may write it again."""


def require_room_for_tuned(folder: Path | None, state: TrainerState) -> None:
    """Stop before training if the tuned weights could not be saved after it.

    Args:
        folder: Where they are to be saved; None if they are not.
        state: Of the Trainer.

    Raises:
        ConfigurationError: The folder holds something else than this run saved before it was resumed, or cannot be
            written, or there will be several models.
    """
    if folder is None:
        return
    if state.is_hyper_param_search:
        raise ConfigurationError(
            "SafeDeltaCallback: keep_tuned names one folder, and a hyper-parameter search has many trials; leave "
            "it out of the search"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not _is_of_run(folder, state):
        raise ConfigurationError(
            f"SafeDeltaCallback: keep_tuned={str(folder)!r} exists already; remove it or choose another folder"
        )
    try:
        require_writable(folder)
    except OutputError as error:
        raise ConfigurationError(f"SafeDeltaCallback: keep_tuned: {error}") from error


def _is_of_run(folder: Path, state: TrainerState) -> bool:
    name, path = name_of_run(state), folder / RUN_FILE
    return name is not None and path.is_file() and path.read_bytes() == _entry(name)


def _entry(name: str | None) -> bytes:
    return json.dumps({"run": name}).encode()


def save_tuned(model: nn.Module, processing_class: ProcessingClass | None, folder: Path, state: TrainerState) -> None:
    """Write a model as it is now; complete or not there at all.

    Where it is sharded, all ranks call this; the main one brings the weights together in host memory and writes.

    Args:
        model: A transformers model; a `PeftModel`, whose adapters are written; or any module, then only
            `model.safetensors` is written.
        processing_class: Tokenizer or processor to save beside it, or None.
        folder: A folder that does not exist, or is empty, or that this run saved before it was resumed.
        state: Of the Trainer, which names the run.
    """
    opened = open_model(model)
    with opened.ranks.together():
        weights = None if opened.is_local else opened.state(but=_never_saved(opened))
        if opened.ranks.is_main:
            with complete_or_absent(folder, replacing=_is_of_run(folder, state)) as unfinished:
                with without_wrappers(model) as bare, _gathered_already(bare):
                    _save(bare, weights, processing_class, unfinished)
                _require_adapters(opened, unfinished)
                (unfinished / RUN_FILE).write_bytes(_entry(name_of_run(state)))


def _save(
    model: nn.Module, weights: dict[str, Tensor] | None, processing_class: ProcessingClass | None, folder: Path
) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        _save_own_adapter(model, weights, folder)
    elif isinstance(model, PushToHubMixin):
        model.save_pretrained(folder, state_dict=weights)  # type: ignore[no-untyped-call]
    elif weights is None:
        save_model(model, str(folder / "model.safetensors"))
    else:
        save_torch_state_dict(weights, folder, max_shard_size=sys.maxsize)
    if processing_class is not None:
        processing_class.save_pretrained(folder)


@contextmanager
def _gathered_already(model: nn.Module) -> Iterator[None]:
    # Told that it is sharded, a model of transformers gathers its weights itself, with all ranks, whatever it is given.
    config: Any = getattr(model, "config", None)
    if (sharded := getattr(config, "distributed_config", None)) is None:
        yield
        return
    try:
        config.distributed_config = None
        yield
    finally:
        config.distributed_config = sharded


def _never_saved(model: ShardedModel) -> set[str]:
    configs = getattr(model.model, "peft_config", {}) or {}
    if not configs or any(getattr(config, "bias", "none") != "none" for config in configs.values()):
        return set()
    # PEFT saves the embeddings of the base with an adapter on them, or if the vocabulary was resized.
    embeddings = set(_embeddings(model.model))
    return {name for name in model.names if model.live(name) not in embeddings}


def _embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    for layer in (embeddings(model, "input"), embeddings(model, "output")):
        yield from () if layer is None else layer.parameters()


def _require_adapters(model: ShardedModel, folder: Path) -> None:
    if not getattr(model.model, "peft_config", None):
        return
    base = set(model.names)
    trained = sum(model.live(name).requires_grad for name in model.all_names if name not in base)
    saved = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved += len(file.keys())
    if saved < trained:
        raise CheckpointError(
            f"{folder.name}: the adapters have {trained} trained tensors, and PEFT saved {saved}, so some are "
            "lost; does something wrap the layers that they are on?"
        )


def _save_own_adapter(model: Any, weights: dict[str, Tensor] | None, folder: Path) -> None:  # noqa: ANN401
    # As the model's `save_pretrained` does, which asks for the newest PEFT, of an adapter that transformers loaded.
    from peft import get_peft_model_state_dict

    (name,) = active_adapters(model)
    state = get_peft_model_state_dict(model, state_dict=weights, adapter_name=name)
    tensors = {f"{ADAPTER_PREFIX}{key}": tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[name].save_pretrained(folder)


def whereabouts(
    error: SafeDeltaError,
    saved: Path | None,
    model: nn.Module,
    processing_class: ProcessingClass | None,
    output_dir: Path,
    state: TrainerState,
) -> str:
    """Where the tuned weights are after the adjustment failed; they are saved if they were not yet and can be.

    Args:
        error: Why it failed.
        saved: Where they were saved before; None if they were not.
        model: The model.
        processing_class: Tokenizer or processor to save beside it, or None.
        output_dir: Where to save them.
        state: Of the Trainer.

    Returns:
        A sentence for the user.
    """
    is_mixed = isinstance(error, RestoreError)
    if saved is not None:
        return f"The tuned weights are {'' if is_mixed else 'unharmed in the model, and '}saved in {str(saved)!r}."
    if is_mixed or not is_shared(error):  # there is nothing to save, or nobody to save it with
        return "The tuned weights are in the last checkpoint, if one was saved."
    return rescue_tuned(model, processing_class, output_dir, state)


def rescue_tuned(
    model: nn.Module, processing_class: ProcessingClass | None, output_dir: Path, state: TrainerState
) -> str:
    """Save the tuned weights after the adjustment failed, under a name that is still free.

    Args:
        model: The tuned model.
        processing_class: Tokenizer or processor to save beside it, or None.
        output_dir: Where to make the folder.
        state: Of the Trainer.

    Returns:
        A sentence on where they are.
    """
    folder = output_dir
    try:
        folder = Ranks.of_run().broadcast(_free_folder(output_dir, state), owner=0)
        save_tuned(model, processing_class, folder, state)
    except Exception as error:  # the adjustment's own error is the one to raise
        return f"The tuned weights are unharmed in the model, but could not be saved in {str(folder)!r}: {error}"
    return f"The tuned weights are unharmed in the model, and saved in {str(folder)!r}."


def _free_folder(output_dir: Path, state: TrainerState) -> Path:
    names = (f"tuned-not-adjusted-{state.global_step}-{number}" for number in count(1))
    return next(folder for name in names if not (folder := output_dir / name).exists())


class TunedWeights:
    """The fine-tuned weights of a model that is adjusted, so that it can be adjusted again in another way.

    Args:
        model: The model, opened, holding them. What is trained of an adapter is copied to host memory, by each process
            what it holds.
        folder: Where those of a whole model were saved; None if they were not.
        is_adapter: Whether an adapter is trained.
    """

    def __init__(self, model: ShardedModel, folder: Path | None, *, is_adapter: bool) -> None:
        self._model = weakref.ref(model.model)
        self._folder = folder
        self._copies: dict[str, Tensor] | None = None
        if is_adapter:
            trained = [name for name in model.all_names if model.live(name).requires_grad]
            self._copies = {name: model.read(name).to("cpu", copy=True) for name in trained}

    def is_of(self, model: ShardedModel) -> bool:
        """Whether these are the weights of a certain model.

        Args:
            model: The model.

        Returns:
            Whether it is the one, and not just one like it.
        """
        return self._model() is model.model

    @contextmanager
    def put_back(self, model: ShardedModel, workspace: Path | None) -> Iterator[None]:
        """Give a model its fine-tuned weights back; if the block fails, what it held before.

        Args:
            model: The model, adjusted.
            workspace: Folder with room for a temporary copy of its weights.

        Yields:
            Nothing.

        Raises:
            ConfigurationError: They were not kept.
        """
        if self._copies is None and self._folder is None:
            raise ConfigurationError(
                "SafeDeltaCallback: this model was adjusted already, and its fine-tuned weights were not kept; pass "
                "keep_tuned=<folder> to the callback before training, or load them into another model (the last "
                "checkpoint holds them, if one was saved) and pass that model to adjust()"
            )
        with Journal(workspace, model.ranks) as journal, model.ranks.together():
            for name, value in self._values(model):
                journal.replace(model.parameter(name), value)
            yield

    def _values(self, model: ShardedModel) -> Iterator[tuple[str, Tensor]]:
        if self._copies is not None:
            yield from self._copies.items()
            return
        assert self._folder is not None, "one of the two was kept"
        saved = open_base(self._folder, model.model)
        yield from ((name, saved.read(name, model.shard(name))) for name in model.names)
