"""Further models that started from the same base: what each of them changed, one weight at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from safedelta_hf.deltas.dense import DenseDelta
from safedelta_hf.deltas.lora_folder import AdapterFolder, LoraTensors
from safedelta_hf.deltas.lora_settings import CONFIG_FILE
from safedelta_hf.deltas.low_rank import FactoredDelta
from safedelta_hf.errors import BaseWeightsError, MergeError
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.weights.readers import FilesReader, ModelReader

FurtherModel = Callable[[str, Tensor], Tensor]
"""Gives, for a canonical name and the base weight in float32, the model's weight minus it, float32, where that is.

Raises `MergeError` where there is none."""


def seen_from_base(read: Callable[[str], Tensor], source: str) -> FurtherModel:
    """A further model whose weights can be read.

    Args:
        read: Reads the weight of a canonical name.
        source: Where they come from, for errors.

    Returns:
        What the model changed of each weight.
    """

    def delta(name: str, base: Tensor) -> Tensor:
        try:
            weight = read(name)
        except BaseWeightsError as error:
            raise MergeError(
                f"{source} has no such weight that can be read; give a model of the same architecture, saved whole"
            ) from error
        if weight.shape != base.shape:
            raise MergeError(
                f"{list(weight.shape)} in {source}, {list(base.shape)} in the base; give a model that "
                "started from the same base"
            )
        return weight.to(base) - base

    return delta


def further_adapter(folder: Path, header: ProfileHeader, transposed: set[str]) -> FurtherModel:
    """A LoRA that PEFT saved, on the base.

    Args:
        folder: Its folder.
        header: What the profile of the base was made from.
        transposed: Names of the weights that are stored with their inputs first.

    Returns:
        What the adapter changes of each weight; zero where it does nothing.

    Raises:
        AdapterError: It cannot be read, or is no LoRA.
        ProfileError: It says that it is on another base.
        MergeError: It carries a parameter whole, or tunes one that the base does not have.
    """

    def refuse(name: str) -> Tensor:
        raise MergeError(
            f"{name}: carried whole by the adapter {str(folder)!r}; merge it into its base (merge_and_unload), "
            "save the model, and give that folder"
        )

    adapter = AdapterFolder(folder)
    adapter.doubt(header)
    tuned = {delta.parameter: delta for delta in LoraTensors(adapter, header, transposed, refuse)}
    if strangers := sorted(set(tuned) - set(header.base)):
        raise MergeError(
            f"{strangers[0]}: tuned by {str(folder)!r}, and no parameter of the base; give an adapter on this base"
        )

    def delta(name: str, base: Tensor) -> Tensor:
        if name not in tuned:
            return torch.zeros_like(base)
        own = tuned[name]
        if own.shape != base.shape:
            raise MergeError(
                f"{list(own.shape)} in {str(folder)!r}, {list(base.shape)} in the base; give an adapter on the "
                "same base"
            )
        change = own.delta()
        assert isinstance(change, DenseDelta | FactoredDelta), "others were refused when it was opened"
        return change.values.reshape(base.shape).to(base)

    return delta


def open_further_model(
    source: nn.Module | str | Path,
    aliases: Mapping[str, tuple[str, ...]],
    header: ProfileHeader,
    transposed: set[str],
) -> FurtherModel:
    """Open a further model.

    Args:
        source: A model; a folder or cached repository of one; or the folder of a LoRA.
        aliases: Other names under which a parameter may stand in files, by canonical name.
        header: What the profile of the base was made from.
        transposed: Names of the weights that are stored with their inputs first.

    Returns:
        The model, seen from the base.

    Raises:
        MergeError: It is a model with an adapter on it, or there are no files.
    """
    if isinstance(source, nn.Module):
        if getattr(source, "peft_config", None):
            raise MergeError(
                f"a {type(source).__name__} in memory has an adapter beside its weights; pass its merge_and_unload(), "
                "or the folder of the adapter"
            )
        return seen_from_base(ModelReader(source).read, ModelReader.source)
    if (Path(source) / CONFIG_FILE).is_file():
        return further_adapter(Path(source), header, transposed)
    try:
        return seen_from_base(FilesReader(source, aliases).read, str(source))
    except BaseWeightsError as error:
        raise MergeError(
            f"{str(source)!r} holds no safetensors files of a model and no adapter; give one of these folders"
        ) from error
