"""Where moments are while they are summed, and moments by key: in memory, on another rank, summed as they are read."""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.low_rank import LowRank, tensors_of
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import CaptureError, ConfigurationError, ProfileError


class Moments(Mapping[str, InputMoment]):
    """A mapping of keys to moments that knows the shape of each without reading it; here of moments in memory.

    Elsewhere, reading one may take memory of its size, a file or a network; `shape`, iteration and membership take
    none.

    Args:
        entries: The moments by key; in a subclass, anything that it knows of each.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries

    def __getitem__(self, key: str) -> InputMoment:
        moment: InputMoment = self._entries[key]
        return moment

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries  # the inherited way would read the moment

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a moment, known without reading it.

        Args:
            key: Its key.

        Returns:
            `(in, in)`, or `(in,)` for the diagonal kind.

        Raises:
            KeyError: There is no such moment.
        """
        return tuple(self[key].total.shape)

    def rank(self, key: str) -> int | None:
        """Rows of the factor that a moment is, known without reading it.

        Args:
            key: Its key.

        Returns:
            Their number; None for a moment that is a matrix or a diagonal, or that is not known yet.
        """
        entry = self._entries[key]
        total = entry.total if isinstance(entry, InputMoment) else None
        return total.rank if isinstance(total, LowRank) and total.rest is None else None

    def owner(self, key: str) -> int | None:
        """The one rank that can read a moment.

        Args:
            key: Its key.

        Returns:
            The rank; None where each can.
        """
        return None

    def identity(self) -> str:
        """What tells these moments from others.

        Returns:
            A digest of their values, each of which is read once.
        """
        result = hashlib.sha256()
        for key, moment in self.items():
            for total in tensors_of(moment.total):
                told = [key, str(total.dtype), list(total.shape), moment.sequences, moment.tokens]
                result.update(json.dumps(told).encode())
                result.update(total.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return result.hexdigest()


class ShardedMoments(Moments):
    """Moments by key, each on one rank; all ranks know which there are, and of what shape.

    Args:
        shapes: Shape of each moment; the same on all ranks.
        owners: The rank that has each of them; the same on all ranks.
        held: The moments that this rank owns, at least.
        ranks: The ranks.

    Attributes:
        owners: The rank that has each moment.
        ranks: The ranks.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        owners: Mapping[str, int],
        held: Mapping[str, InputMoment],
        ranks: Ranks,
    ) -> None:
        super().__init__(shapes)
        self.owners, self.ranks, self._held = owners, ranks, held

    @override
    def __getitem__(self, key: str) -> InputMoment:
        owner = self.owners[key]
        if owner != self.ranks.rank:
            raise CaptureError(
                f"{key}: its moment is held by rank {owner}, not by rank {self.ranks.rank}; save the profile and load "
                "it to have all moments on every rank"
            )
        return self._held[key]

    @override
    def shape(self, key: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._entries[key]
        return shape

    @override
    def owner(self, key: str) -> int:
        return self.owners[key]

    def brought(self, key: str, receiver: int) -> InputMoment | None:
        """Bring a moment to a rank; all ranks do it together.

        Args:
            key: Its key.
            receiver: The rank that is to have it.

        Returns:
            The moment on that rank, None on others.
        """
        owner, rank = self.owners[key], self.ranks.rank
        moment = self[key] if owner == rank else None
        moment = moment if owner == receiver else self.ranks.broadcast(moment, owner)
        return moment if rank == receiver else None


class NoMoments(Moments):
    """What stands for the moments where no data was read; keys and shapes are those that they would have.

    Args:
        shapes: Shape of each.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(shapes)

    @override
    def __getitem__(self, key: str) -> InputMoment:
        raise ProfileError(f"{key}: no data was read, so there is no moment; give safety data, or a profile of them")

    @override
    def shape(self, key: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._entries[key]
        return shape

    @override
    def identity(self) -> str:
        return "no data was read"


class SummedMoments(Moments):
    """Sums of the moments of two profiles, made when they are read.

    Args:
        one: Moments.
        other: Moments of another profile of the same base.
        twins: Key of the moment in `other`, by the key in the sum; a sum that is not named here is the one in `one`.
        add: What makes a sum of the two, of which one may be None.
    """

    def __init__(
        self,
        one: Moments,
        other: Moments,
        twins: Mapping[str, str],
        add: Callable[[InputMoment | None, InputMoment | None], InputMoment],
    ) -> None:
        super().__init__(dict.fromkeys((*one, *twins)))
        self._one, self._other, self._twins, self._add = one, other, twins, add

    @override
    def __getitem__(self, key: str) -> InputMoment:
        one = self._one[key] if key in self._one else None
        return self._add(one, self._other[self._twins[key]] if key in self._twins else None)

    @override
    def shape(self, key: str) -> tuple[int, ...]:
        return self._one.shape(key) if key in self._one else self._other.shape(self._twins[key])


SPARE: Final = 0.1
"""Share of host memory that is left to others."""

SPARE_ON_DEVICE: Final = 0.2
"""The same of any other device, for activations for the most part."""

LOOKS: Final = 8
"""What is free is looked at again once this part of it has been given away."""

_LIMITS: Final = Path("/sys/fs/cgroup")
"""Where Linux says how much memory a container may take."""


class MomentStorage:
    """Holds moments while they are summed: on the device of their layer, else in host memory, else in mapped files.

    Without a budget what is free decides, of the device, of the host and on the disk. With one, moments are on the
    device until it is spent; later ones go to host memory, or, with an offload folder, to memory-mapped files. Each
    batch then costs one transfer of `in * in` floats per offloaded moment: larger batches make it cheaper.

    Args:
        budget: Bytes of moments held on the device (with an offload folder: in memory at all); None for what is free.
        offload_folder: Folder for memory-mapped moments; files are removed with the last reference to the storage.
            Without a budget, that of the system for temporary files if None.
    """

    def __init__(self, budget: int | None = None, offload_folder: str | Path | None = None) -> None:
        self._left = None if budget is None else float(budget)
        self._granted: dict[str, float] = {}
        self._files = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if offload_folder is not None:
            Path(offload_folder).mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="moments-", dir=offload_folder)

    def takes(self, rows: Tensor) -> bool:
        """Whether there is room, where they are, for inputs that are kept; it is theirs from now on.

        Args:
            rows: The inputs.

        Returns:
            Whether there is.
        """
        return self._fits(rows.nbytes, rows.device)

    def release(self, rows: Tensor) -> None:
        """Take back the room of inputs.

        Args:
            rows: The inputs.
        """
        if self._left is not None:
            self._left += rows.nbytes

    def allocate(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Zeros for one moment.

        Args:
            shape: [in, in] or [in].
            device: Device of the layer.

        Returns:
            A float32 tensor on that device, in host memory, or mapped from a file.

        Raises:
            ConfigurationError: There is no room for it: the budget is spent, the layer is in host memory already and
                there is no folder; or, without a budget, nothing is free anywhere.
        """
        size, host = 4 * math.prod(shape), torch.device("cpu")
        if self._fits(size, device):
            return torch.zeros(shape, dtype=torch.float32, device=device)
        if self._left is None:
            if device.type != "cpu" and self._fits(size, host):
                return torch.zeros(shape, dtype=torch.float32)
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="moments-")
            free = shutil.disk_usage(self._folder.name).free
            if size > free:
                raise ConfigurationError(
                    f"moments: there is room for the next one, of {size / 1e9:.2f} GB, neither in memory nor in "
                    f"{self._folder.name!r} ({free / 1e9:.2f} GB free); pass offload_folder=DIR on a larger disk, "
                    "choose fewer layers (targets), or give less safety data than a layer has inputs"
                )
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

    def settled(self, total: Tensor) -> Tensor:
        """A finished moment off its device.

        Args:
            total: The moment, wherever it is.

        Returns:
            The same in host memory, or mapped from a file.
        """
        if total.device.type == "cpu" or self._left is not None:
            return total.cpu()
        return self.allocate(tuple(total.shape), torch.device("cpu")).copy_(total)

    def _fits(self, size: int, device: torch.device) -> bool:
        if self._left is not None:
            fits = size <= self._left
            self._left -= size if fits else 0
            return fits
        place = str(device)
        if size > self._granted.get(place, 0.0):
            free = free_memory(device)
            if size > free:
                return False
            self._granted[place] = max(free / LOOKS, size)
        self._granted[place] -= size
        return True


def free_memory(device: torch.device) -> float:
    """How much of a device moments may take now.

    Args:
        device: The device.

    Returns:
        Bytes, of which a part stays free for others; infinite where the device does not tell.
    """
    if device.type == "cpu":
        free, total = _host_memory()
        return free - SPARE * total
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return math.inf
    free, total = module.mem_get_info(device)
    cached = module.memory_reserved(device) - module.memory_allocated(device)
    return float(free + cached - SPARE_ON_DEVICE * total)


def _host_memory() -> tuple[float, float]:
    # What is free and what there is, of the machine or of the container.
    memory = psutil.virtual_memory()
    try:
        limit = int((_LIMITS / "memory.max").read_text())
        taken = int((_LIMITS / "memory.current").read_text())
        told = dict(line.split() for line in (_LIMITS / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a limit
        return float(memory.available), float(memory.total)
    free = limit - taken + int(told.get("inactive_file", 0))
    return float(min(free, memory.available)), float(min(limit, memory.total))
