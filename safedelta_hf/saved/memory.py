"""Whether a model fits in memory, told from the headers of its files before anything is loaded."""

import math
from typing import Final

import torch

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.profile.moments import free_memory
from safedelta_hf.weights.safetensors_files import SafetensorsFiles

DEVICE_MAPS: Final = ("auto", "balanced", "balanced_low_0", "sequential")
"""What transformers takes for all devices together, host memory included."""

COPIES: Final = 4
"""Of one weight at a time, in float32: base, delta, what is kept of it, and that as it is rounded."""


def devices_of(device: str) -> list[torch.device]:
    """The devices that a model may be spread over.

    Args:
        device: A device, or one of `DEVICE_MAPS`.

    Returns:
        Accelerators first, the host last.

    Raises:
        ConfigurationError: It is neither.
    """
    if device in DEVICE_MAPS:
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        number = 0 if kind is None else torch.accelerator.device_count()
        found = [torch.device(kind.type, index) for index in range(number)] if kind is not None else []
        return [*found, torch.device("cpu")]
    try:
        return [torch.empty(0, device=device).device]
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"device={device!r} cannot be used here ({error}); give another, such as 'cpu', or 'auto'"
        ) from error


def bytes_needed(files: SafetensorsFiles) -> int:
    """What measuring a model takes.

    Args:
        files: Its weights.

    Returns:
        The bytes of all of them, and of the copies that are made of the largest while it is adjusted.
    """
    weights = sum(tensor.stop - tensor.start for tensor in files.tensors.values())
    largest = max((math.prod(tensor.shape) for tensor in files.tensors.values()), default=0)
    return weights + COPIES * 4 * largest


def require_memory(files: SafetensorsFiles, device: str, why: str, instead: str) -> None:
    """Stop before time is lost where a model has no room.

    Args:
        files: Its weights.
        device: Where it will be, as in `devices_of`.
        why: What it is loaded for.
        instead: What to do where there is no room for it.

    Raises:
        ConfigurationError: There is not.
    """
    needed, free = bytes_needed(files), sum(map(free_memory, devices_of(device)))
    if needed > free:
        raise ConfigurationError(
            f"{files.source!r} takes {needed / 1e9:.3g} GB in memory, and {max(free, 0) / 1e9:.3g} GB are free "
            f"(device={device!r}), so it cannot be loaded to {why}. {instead}"
        )
