"""Where the parameters of a model stand in files: as they are, or renamed and split as transformers saves them."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from typing_extensions import override

from safedelta_hf.distributed.model import Shard
from safedelta_hf.errors import BaseWeightsError, CheckpointError
from safedelta_hf.modules.names import parameter_names, wrapping_told
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.weights.readers import WeightReader
from safedelta_hf.weights.safetensors_files import FLOATING, LARGEST_INDEX, SafetensorsFiles

_COUNTS: Final = re.compile(r"layer|expert|head")
"""Settings of a model by which it is built piece by piece."""

_CALLS: Final = 200
"""Calls of torch, for each tensor, that making a model without values may take; it takes some ten."""


@dataclass(frozen=True, kw_only=True)
class StoredParameter:
    """A parameter in files: as it is, or split into several tensors, such as one for each expert.

    Attributes:
        shape: Its shape.
        tensors: The tensors that hold it together, by name in the files: views of the contiguous parameter, on the meta
            device, whose strides and offsets say which entries each of them holds.
        twins: Further names under which the whole of it, being tied, is stored again.
    """

    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    twins: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors that hold it."""
        return (*self.tensors, *self.twins)

    def read(self, files: SafetensorsFiles) -> Tensor:
        """Read it.

        Args:
            files: The files.

        Returns:
            A new tensor in host memory, in the dtype of the files.
        """
        first, *further = self.tensors
        if not further and self.tensors[first].shape == self.shape and self.tensors[first].is_contiguous():
            return files.read(first)
        weight = torch.empty(self.shape, dtype=FLOATING[files.tensors[first].dtype])
        for name, part in self.split(weight):
            part.copy_(files.read(name))
        return weight

    def split(self, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors that hold it together.

        Args:
            weight: The parameter, contiguous.

        Yields:
            Name as in the files, and a view of the weight.
        """
        for name, view in self.tensors.items():
            yield name, weight.as_strided(view.shape, view.stride(), weight.storage_offset() + view.storage_offset())


class StoredWeights(WeightReader):
    """Reads base weights where they were found in files.

    Args:
        files: The files.
        stored: How each parameter stands there, by canonical name.
    """

    def __init__(self, files: SafetensorsFiles, stored: Mapping[str, StoredParameter]) -> None:
        self._files, self._stored = files, stored

    @property
    @override
    def source(self) -> str:
        return self._files.source

    @override
    def holds(self, name: str) -> bool:
        return name in self._stored

    @override
    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        try:
            weight = self._stored[name].read(self._files)
        except CheckpointError as error:
            raise BaseWeightsError(f"base: {error}") from error
        return weight if shard is None else shard.of(weight)


def stored_in(
    files: SafetensorsFiles, header: ProfileHeader, aliases: Mapping[str, tuple[str, ...]]
) -> dict[str, StoredParameter]:
    """Where the parameters of a model stand in files.

    Args:
        files: The files.
        header: What a profile of the model was made from; no digest is looked at.
        aliases: Further names of tied parameters.

    Returns:
        How each is stored, by canonical name.

    Raises:
        CheckpointError: One is not there, or cannot be read as numbers.
    """
    found: dict[str, StoredParameter] = {}
    layout: dict[str, StoredParameter] | None = None
    for name in header.base:
        names = [one for one in (name, *aliases.get(name, ())) if one in files.tensors]
        if names:
            shape = files.tensors[names[0]].shape
            whole = {names[0]: torch.empty(shape, device="meta")}
            found[name] = StoredParameter(shape=shape, tensors=whole, twins=tuple(names[1:]))
        else:
            layout = layout or _layout(name, files, header)
            if name not in layout:
                raise CheckpointError(_absence(name, files, header))
            found[name] = layout[name]
            _require_covered(name, found[name], files, header)
        _require_readable(name, found[name], files, header)
    return found


def _layout(name: str, files: SafetensorsFiles, header: ProfileHeader) -> dict[str, StoredParameter]:
    try:
        return saved_layout(files, header)
    except CheckpointError as error:
        raise CheckpointError(f"{_absence(name, files, header)}; {error}") from error


def _absence(name: str, files: SafetensorsFiles, header: ProfileHeader) -> str:
    strangers = _first(one for one in files.tensors if one not in header.base)
    found = f", which has {strangers} instead{wrapping_told(files.tensors, header.base)}" if strangers else ""
    return (
        f"{name}: a parameter of the {header.architecture} that the profile was made for, and not in "
        f"{files.source!r}{found}. A quantised checkpoint cannot be adjusted; if transformers renames its weights when "
        "it loads them, load the model, save it with save_pretrained(..., save_original_format=False) and give that "
        "folder"
    )


def _require_covered(name: str, stored: StoredParameter, files: SafetensorsFiles, header: ProfileHeader) -> None:
    count, covered = math.prod(stored.shape), sum(view.numel() for view in stored.tensors.values())
    if not stored.tensors or covered != count:
        raise CheckpointError(
            f"{_absence(name, files, header)}; its layout is not known (transformers saves {covered} of its {count} "
            "entries)"
        )


def _require_readable(name: str, stored: StoredParameter, files: SafetensorsFiles, header: ProfileHeader) -> None:
    for one in stored.names:
        if one not in files.tensors:
            raise CheckpointError(_absence(name, files, header))
    _require_floating(files, stored.names)
    shapes = dict.fromkeys(stored.twins, stored.shape) | {
        one: tuple(view.shape) for one, view in stored.tensors.items()
    }
    for one, shape in shapes.items():
        if files.tensors[one].shape != shape:
            raise CheckpointError(
                f"{name}: {one} is {list(files.tensors[one].shape)} in {files.source!r} and should be {list(shape)}; "
                "give a model as it was saved, with its own config.json"
            )
    if len(types := sorted({files.tensors[one].dtype for one in stored.names})) > 1:
        raise CheckpointError(
            f"{name}: its parts are stored as {' and '.join(types)} in {files.source!r}; save the model in one type"
        )


def _require_floating(files: SafetensorsFiles, names: Collection[str]) -> None:
    for name in names:
        if (dtype := files.tensors[name].dtype) not in FLOATING:
            raise CheckpointError(
                f"{name}: stored as {dtype} in {files.source!r}; only {', '.join(FLOATING)} are read as numbers, so "
                "give the model as it was before it was quantised"
            )


def _first(names: Iterable[str], most: int = 2) -> str:
    return ", ".join(name for name, _ in zip(names, range(most), strict=False))


def saved_layout(files: SafetensorsFiles, header: ProfileHeader) -> dict[str, StoredParameter]:
    """How transformers would save the model that some files are of, told by its class and configuration alone.

    Args:
        files: The files, with the configuration beside them.
        header: What the profile of the model was made from.

    Returns:
        Each parameter, renamed and split as it would be saved, by canonical name.

    Raises:
        CheckpointError: The class is not one of transformers, or the configuration not one of it, or saving computes
            something that is no part of a parameter.
    """
    try:
        model = skeleton(files, header.architecture, len(header.base))
        parameters = {name: parameter.detach() for parameter, name in parameter_names(model).items()}
        _require_as_many(parameters.values(), files)
        with _Uncopied():
            saved: dict[str, Tensor] = revert_weight_conversion(model, dict(parameters))
    except CheckpointError as error:
        raise CheckpointError(f"its layout is not known ({error})") from error
    except Exception as error:
        raise CheckpointError(f"its layout is not known ({type(error).__name__}: {error})") from error
    owners = {_storage(parameter): name for name, parameter in parameters.items()}
    views: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for name, tensor in saved.items():
        if (owner := owners.get(_storage(tensor))) is None:
            raise CheckpointError(f"its layout is not known ({name} is no part of a parameter)")
        views[owner][name] = tensor
    return {name: StoredParameter(shape=tuple(parameters[name].shape), tensors=found) for name, found in views.items()}


def skeleton(files: SafetensorsFiles, architecture: str, parameters: int) -> PreTrainedModel:
    """The model that some files are of, without values, built of its configuration.

    Args:
        files: The files, with the configuration beside them.
        architecture: Name of its class.
        parameters: How many it has, about; one with many more is not built.

    Returns:
        The model, on the meta device.

    Raises:
        CheckpointError: The class is not one of transformers, or the configuration describes a larger model.
    """
    model_class = getattr(transformers, architecture, None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise CheckpointError(f"{architecture} is no class of transformers")
    if files.config is None:
        raise CheckpointError("there is no config.json")
    _require_plausible(files.config, files, parameters)
    config = AutoConfig.from_pretrained(files.config.parent, local_files_only=True, trust_remote_code=False)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > parameters:
        raise CheckpointError(f"config.json speaks of {layers} layers, the model has {parameters} parameters")
    calls = _CALLS * (parameters + len(files.tensors))
    with torch.device("meta"), _Bounded(calls):
        return model_class(config)


def _require_plausible(path: Path, files: SafetensorsFiles, parameters: int) -> None:
    # Before anything is built of it: numbers of layers, experts and heads are at most those of tensors, or a dimension.
    if path.stat().st_size > LARGEST_INDEX:
        raise CheckpointError(f"config.json is larger than {LARGEST_INDEX} bytes")
    sides = [side for tensor in files.tensors.values() for side in tensor.shape]
    most = max(parameters, len(files.tensors), *sides)
    left: list[tuple[str, Any]] = [("config.json", json.loads(path.read_text(encoding="utf-8")))]
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left.extend(value.items())
        elif isinstance(value, list):
            left.extend((name, one) for one in value)
        elif isinstance(value, int) and value > most and _COUNTS.search(name.lower()):
            raise CheckpointError(f"config.json speaks of {name}={str(value)[:20]}, the files of {most} at most")


def _require_as_many(parameters: Iterable[Tensor], files: SafetensorsFiles) -> None:
    described = sum(parameter.numel() for parameter in parameters)
    stored = sum(math.prod(tensor.shape) for tensor in files.tensors.values())
    if described > 2 * stored:  # tied weights are stored once
        raise CheckpointError(f"config.json describes {described} entries of weights, the files hold {stored}")


class _Bounded(TorchFunctionMode):
    """Stops what calls functions of torch without end.

    Args:
        calls: Calls that are let through.
    """

    def __init__(self, calls: int) -> None:
        super().__init__()
        self._left = calls

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        self._left -= 1
        if self._left < 0:
            raise CheckpointError("config.json describes many more layers than the files hold")
        return func(*args, **(kwargs or {}))


class _Uncopied(TorchFunctionMode):
    """Lets what is made of a tensor stay a view of it, so that its strides tell where it comes from."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        if func in (Tensor.contiguous, Tensor.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
