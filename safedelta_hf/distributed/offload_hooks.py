"""The hooks of accelerate that fetch parameters for a forward pass, and where they keep them meanwhile."""

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, ModelHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors.torch import save_file
from torch import Tensor, nn

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.modules.names import join

WEIGHT = "weight"
"""What a parameter is called in a file of its own."""


def fetching_hooks(module: nn.Module) -> list[AlignDevicesHook | CpuOffload]:
    """The hooks of a module that fetch parameters before it runs.

    Args:
        module: Any module.

    Returns:
        None of them for most modules; those inside a sequence of hooks one by one.
    """
    return [hook for hook in _single(getattr(module, "_hf_hook", None)) if _fetches(hook)]


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate fetches any parameter of a model from elsewhere.

    Args:
        model: Any module.

    Returns:
        Whether it does.
    """
    return any(fetching_hooks(module) for module in model.modules())


def execution_device(model: nn.Module) -> torch.device | None:
    """Where accelerate brings the inputs of a model that it fetches parameters for.

    Args:
        model: Any module.

    Returns:
        The device of the first module that has any fetched; None if there is none.
    """
    devices = (hook.execution_device for module in model.modules() for hook in fetching_hooks(module))
    return next((torch.device(device) for device in devices if device is not None), None)


def require_trainable(model: nn.Module) -> None:
    """Stop before offloaded parameters are trained in vain.

    An optimizer would be given their placeholders, which no gradient ever reaches, and nothing would say so.

    Args:
        model: The model that will be trained.

    Raises:
        ConfigurationError: One of them is offloaded and not frozen.
    """
    if not is_offloaded(model):
        return
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter.requires_grad:
            raise ConfigurationError(
                f"{name}: it is offloaded to host memory or disk, where training does not reach it; freeze it with "
                "requires_grad_(False), or keep its layer on a device (device_map)"
            )


def modules_of(hook: AlignDevicesHook | CpuOffload, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose parameters a hook fetches.

    Args:
        hook: One of `fetching_hooks`.
        module: The module that it is on.

    Returns:
        Each with its name inside that module.
    """
    whole = isinstance(hook, CpuOffload) or hook.place_submodules
    return module.named_modules() if whole else iter([("", module)])


@dataclass(frozen=True)
class Slot:
    """Where accelerate keeps one parameter.

    Attributes:
        hook: Fetches it.
        weights: The mapping that it is read from.
        key: Its name there.
    """

    hook: AlignDevicesHook
    weights: Mapping[str, Tensor]
    key: str

    @classmethod
    def of(cls, hook: AlignDevicesHook | CpuOffload, module: str, key: str) -> "Slot | None":
        """Find where a hook keeps a parameter.

        Args:
            hook: One of `fetching_hooks`.
            module: The module that has the parameter, by its name inside the one that has the hook.
            key: The parameter's name in it.

        Returns:
            The place; None if the hook does not keep it.

        Raises:
            ConfigurationError: It is kept in something that cannot be written to.
        """
        if isinstance(hook, CpuOffload) or hook.weights_map is None:
            return None
        weights, name = hook.weights_map, join(module, key)
        while isinstance(weights, PrefixedDataset):
            weights, name = weights.dataset, f"{weights.prefix}{name}"
        if isinstance(weights, OffloadedWeightsLoader):
            is_kept = name in weights.state_dict or name in weights.index
        elif isinstance(weights, dict):
            is_kept = name in weights
        else:
            raise ConfigurationError(
                f"{name}: it is offloaded to a {type(weights).__name__}, which cannot be written to; load the model "
                "with a device_map, or use accelerate's cpu_offload or disk_offload"
            )
        return cls(hook, weights, name) if is_kept else None

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """The same for parameters that are kept in the same place; None if that cannot be told."""
        kept = self._in_memory
        if kept is not None:
            return memory_of(kept)
        info = self._files.index[self.key]
        file = info.get("safetensors_file")
        return None if file is None else (str(file), info.get("weight_name", self.key))

    @property
    def device(self) -> torch.device:
        """Where the parameter is computed with."""
        device = torch.device(self.hook.execution_device or "cpu")
        return torch.device("cpu") if device.type == "meta" else device

    def read(self) -> Tensor:
        """What is kept.

        Returns:
            It, where it is computed with; the very memory that keeps it, if that is there.
        """
        return self.weights[self.key].detach().to(self.device)

    def write(self, value: Tensor, file: "OwnFile | None") -> "OwnFile | None":
        """Replace what is kept: in memory in place, on disk by a file of our own, so that no file of others is changed.

        Args:
            value: Of the same shape, in the data type of the parameter.
            file: A file that holds the value already, if there is one.

        Returns:
            A file that holds the value, if one was needed.
        """
        kept = self._in_memory
        if kept is not None:
            with torch.no_grad():
                kept.copy_(value)
            return file
        file = file or OwnFile(value, self._files.save_folder)
        entry = {"safetensors_file": file.path, "weight_name": WEIGHT, "dtype": _name(value.dtype), "owner": file}
        # The index may be the caller's, and serve other models.
        self._files.index = {**self._files.index, self.key: entry}
        return file

    @property
    def _in_memory(self) -> Tensor | None:
        kept = self.weights.state_dict if isinstance(self.weights, OffloadedWeightsLoader) else self.weights
        return kept.get(self.key)

    @property
    def _files(self) -> Any:  # noqa: ANN401 - accelerate has no types
        return self.weights


class OwnFile:
    """A tensor in a file that is removed with the last thing that refers to this object, or at exit.

    Args:
        value: The tensor.
        folder: Where to make it; None for the system's temporary folder.
    """

    def __init__(self, value: Tensor, folder: str | Path | None) -> None:
        handle, self.path = tempfile.mkstemp(prefix="safedelta-", suffix=".safetensors", dir=folder)
        os.close(handle)
        weakref.finalize(self, _remove, self.path, os.getpid())
        save_file({WEIGHT: value.detach().cpu().contiguous()}, self.path)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnFile":
        return self  # a copied model reads the same file, which has to last as long


def memory_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """What tells a tensor's memory from that of others.

    Args:
        tensor: Any tensor.

    Returns:
        None if it has none.
    """
    if tensor.is_meta or not tensor.numel():
        return None
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _single(hook: ModelHook | None) -> Iterator[ModelHook]:
    if isinstance(hook, SequentialHook):
        for one in hook.hooks:
            yield from _single(one)
    elif hook is not None:
        yield hook


def _fetches(hook: ModelHook) -> bool:
    return isinstance(hook, CpuOffload) or (isinstance(hook, AlignDevicesHook) and bool(hook.offload))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:  # not in a worker that was forked from it
        with suppress(OSError):
            os.unlink(path)
