"""Where moments are held while they are summed: a budget of fast memory, then host memory or disk."""

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from safedelta_hf.errors import ConfigurationError


class MomentStorage:
    """Allocates zeroed float32 moments within a memory budget.

    Moments are allocated on the device of their layer until the budget is spent. Later ones go to host memory, or, with
    an offload folder, to memory-mapped files. Each batch then costs one transfer of `in * in` floats per offloaded
    moment: larger batches make it cheaper.

    Args:
        budget: Bytes of moments held on the device (with an offload folder: in memory at all), or None for no limit.
        offload_folder: Folder for memory-mapped moments; files are removed with the last reference to the storage.
    """

    def __init__(self, budget: int | None = None, offload_folder: str | Path | None = None) -> None:
        self._settings = budget, offload_folder
        self._left = math.inf if budget is None else float(budget)
        self._files = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if offload_folder is not None:
            Path(offload_folder).mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="moments-", dir=offload_folder)

    def anew(self) -> "MomentStorage":
        """Another storage with the same settings, of which nothing is used.

        Returns:
            The storage.
        """
        return MomentStorage(*self._settings)

    def allocate(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Zeros for one moment.

        Args:
            shape: [in, in] or [in].
            device: Device of the layer.

        Returns:
            A float32 tensor on that device, in host memory, or mapped from a file.

        Raises:
            ConfigurationError: The budget is spent, the layer is in host memory already and there is no folder.
        """
        size = 4 * math.prod(shape)
        if size <= self._left:
            self._left -= size
            return torch.zeros(shape, dtype=torch.float32, device=device)
        if self._folder is not None:
            self._files += 1
            path = Path(self._folder.name) / f"{self._files:05d}.f32"
            return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)
        if device.type == "cpu":
            raise ConfigurationError(
                "moment_memory is spent and the model is in host memory already; pass offload_folder=DIR to keep the "
                "rest of the moments on disk, or raise moment_memory"
            )
        return torch.zeros(shape, dtype=torch.float32)
