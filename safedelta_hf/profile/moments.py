"""Where moments are while they are summed, and moments by key: in memory, on another rank, summed as they are read."""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.moment import InputMoment
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import CaptureError, ConfigurationError


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
            total = moment.total.detach().cpu().contiguous()
            told = [key, str(total.dtype), list(total.shape), moment.sequences, moment.tokens]
            result.update(json.dumps(told).encode())
            result.update(total.reshape(-1).view(torch.uint8).numpy().data)
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
        self._left = math.inf if budget is None else float(budget)
        self._files = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if offload_folder is not None:
            Path(offload_folder).mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="moments-", dir=offload_folder)

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
