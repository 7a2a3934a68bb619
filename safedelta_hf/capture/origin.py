"""Which entries of a parameter a tensor shows."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safedelta_hf.capture.identity import storage_key, weak_storage


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The entries of one parameter that a tensor shows, as strides over the flattened parameter.

    Attributes:
        parameter: Canonical name.
        start: Index in the flattened parameter of the tensor's first entry.
        shape: Shape of the tensor.
        strides: Steps in the flattened parameter along each dimension; 0 where an entry is repeated.
        factor: Slope of the elementwise map from the parameter to the tensor, where it is the same for all entries.
        slopes: A further factor for each entry of the flattened parameter, or None.
    """

    parameter: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    factor: float = 1.0
    slopes: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the entries lie in order, without gaps."""
        wanted = zip(self.shape, self.strides, contiguous(self.shape), strict=True)
        return all(size == 1 or stride == step for size, stride, step in wanted)

    @property
    def count(self) -> int:
        """Number of different entries, at least 1."""
        own, _ = self.split()
        return max(1, torch.Size(self.shape[n] for n in own).numel())

    def select(self, dimension: int, index: int) -> "Origin":
        """One slice along a dimension, as `torch.select`.

        Args:
            dimension: The dimension, which disappears.
            index: Position along it.

        Returns:
            The origin of the slice.
        """
        rest = [number for number in range(len(self.shape)) if number != dimension % len(self.shape)]
        return replace(
            self,
            start=self.start + index * self.strides[dimension],
            shape=tuple(self.shape[number] for number in rest),
            strides=tuple(self.strides[number] for number in rest),
        )

    def entries(self, values: Tensor) -> Tensor:
        """What belongs to these entries.

        Args:
            values: One value for each entry of the flattened parameter.

        Returns:
            A view of it, with one dimension for each along which the entries differ.
        """
        own, _ = self.split()
        return values.as_strided([self.shape[n] for n in own], [self.strides[n] for n in own], self.start)

    def broadcast(self, shape: Sequence[int]) -> "Origin":
        """The same entries repeated to a larger shape, as `torch.broadcast_to`.

        Args:
            shape: A shape that this one broadcasts to.

        Returns:
            The origin of the broadcast tensor.
        """
        missing = len(shape) - len(self.shape)
        own = zip(self.shape, self.strides, shape[missing:], strict=True)
        strides = (0,) * missing + tuple(stride if size == wanted else 0 for size, stride, wanted in own)
        return replace(self, shape=tuple(shape), strides=strides)

    def split(self) -> tuple[list[int], list[int]]:
        """Dimensions along which the entries differ, and those along which they are repeated.

        Returns:
            Both, as indices.
        """
        own = [n for n, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)) if stride and size > 1]
        return own, [number for number in range(len(self.shape)) if number not in own]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the memory of one tensor maps to entries of a parameter.

    Attributes:
        storage: The memory.
        memory_start: Where in it the tensor begins.
        memory_strides: Steps in it along each dimension of the tensor.
        origin: The entries.
        tensor: The tensor itself, if it is no copy.
    """

    storage: StorageWeakRef
    memory_start: int
    memory_strides: tuple[int, ...]
    origin: Origin
    tensor: "weakref.ref[Tensor] | None" = None

    @classmethod
    def of(cls, tensor: Tensor, origin: Origin, *, is_copy: bool) -> "Layout":
        """The layout of a tensor as it is now.

        Args:
            tensor: The tensor.
            origin: What it shows.
            is_copy: Whether it is a copy of a parameter.

        Returns:
            Its layout.
        """
        return cls(
            storage=weak_storage(tensor),
            memory_start=int(tensor.storage_offset()),
            memory_strides=tensor.stride(),
            origin=origin,
            tensor=None if is_copy else weakref.ref(tensor),
        )

    @property
    def is_alive(self) -> bool:
        """Whether the memory is still there."""
        return not self.storage.expired()  # type: ignore[no-untyped-call]

    @property
    def is_valid(self) -> bool:
        """Whether the parameter itself is still in that memory."""
        tensor = None if self.tensor is None else self.tensor()
        return tensor is not None and storage_key(tensor) == self.storage.cdata

    @property
    def memory_stop(self) -> int:
        """One past the last place in memory."""
        steps = ((n - 1) * step for n, step in zip(self.origin.shape, self.memory_strides, strict=True))
        return self.memory_start + sum(steps) + 1

    def holds(self, memory: int) -> bool:
        """Whether a place in memory lies in the tensor.

        Args:
            memory: Its number.

        Returns:
            Whether it does.
        """
        return self.memory_start <= memory < self.memory_stop

    def overlaps(self, other: "Layout") -> bool:
        """Whether two tensors in the same storage have places in common.

        Args:
            other: The layout of the other.

        Returns:
            Whether their spans do.
        """
        return self.memory_start < other.memory_stop and other.memory_start < self.memory_stop

    def entry(self, memory: int) -> int:
        """Which entry of the parameter stands at a place in memory.

        Args:
            memory: A place in the tensor.

        Returns:
            Its index in the flattened parameter.
        """
        rest, entry = memory - self.memory_start, self.origin.start
        dimensions = zip(self.memory_strides, self.origin.shape, self.origin.strides, strict=True)
        for step, size, stride in sorted(dimensions, reverse=True):
            if size > 1 and step:
                position, rest = divmod(rest, step)
                entry += position * stride
        return entry


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor.

    Args:
        shape: Its shape.

    Returns:
        Steps in its memory along each dimension.
    """
    return torch.empty(tuple(shape), device="meta").stride()


def seen_through(layout: Layout, tensor: Tensor) -> Origin | None:
    """What a view shows of a parameter.

    Args:
        layout: Layout of the memory that it looks at.
        tensor: The view.

    Returns:
        Its origin, or None if its entries are not evenly spaced.
    """
    memory = int(tensor.storage_offset())
    start = layout.entry(memory)
    steps = [
        layout.entry(memory + int(step)) - start if size > 1 else 0
        for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    last = memory + sum((size - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    # Dimensions that were merged out of order have no even spacing; then the far corner is elsewhere.
    if tensor.numel() and layout.entry(last) != start + sum(
        (size - 1) * step for size, step in zip(tensor.shape, steps, strict=True)
    ):
        return None
    return replace(layout.origin, start=start, shape=tuple(tensor.shape), strides=tuple(steps))
