"""Which parameter a tensor is a view or a copy of, which of its entries it shows, and which tensors depend on data."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safedelta_hf.records.uses import MatrixView


def weak_storage(tensor: Tensor) -> StorageWeakRef:
    """A weak reference to a tensor's storage.

    Args:
        tensor: Any tensor.

    Returns:
        The reference.
    """
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def storage_key(tensor: Tensor) -> int:
    """Address of a tensor's storage; not given to another storage while a weak reference to this one is held.

    Args:
        tensor: Any tensor.

    Returns:
        The address.
    """
    key: int = tensor.untyped_storage()._cdata
    return key


@dataclass(frozen=True, kw_only=True)
class ParameterView:
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
        wanted = zip(self.shape, self.strides, _contiguous(self.shape), strict=True)
        return all(size == 1 or stride == step for size, stride, step in wanted)

    @property
    def matrix(self) -> MatrixView:
        """The matrix of its entries, of a view of two dimensions."""
        (rows, columns), (row_stride, column_stride) = self.shape, self.strides
        return MatrixView(
            start=self.start, rows=rows, columns=columns, row_stride=row_stride, column_stride=column_stride
        )

    @property
    def count(self) -> int:
        """Number of different entries, at least 1."""
        own, _ = self.split()
        return max(1, torch.Size(self.shape[n] for n in own).numel())

    def select(self, dimension: int, index: int) -> "ParameterView":
        """One slice along a dimension, as `torch.select`.

        Args:
            dimension: The dimension, which disappears.
            index: Position along it.

        Returns:
            The view of the slice.
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

    def broadcast(self, shape: Sequence[int]) -> "ParameterView":
        """The same entries repeated to a larger shape, as `torch.broadcast_to`.

        Args:
            shape: A shape that this one broadcasts to.

        Returns:
            The view of the broadcast tensor.
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
class _Layout:
    """How the memory of one tensor maps to entries of a parameter.

    Attributes:
        storage: The memory.
        memory_start: Where in it the tensor begins.
        memory_strides: Steps in it along each dimension of the tensor.
        view: The entries.
        tensor: The tensor itself, if it is no copy.
    """

    storage: StorageWeakRef
    memory_start: int
    memory_strides: tuple[int, ...]
    view: ParameterView
    tensor: "weakref.ref[Tensor] | None" = None

    @classmethod
    def of(cls, tensor: Tensor, view: ParameterView, *, is_copy: bool) -> "_Layout":
        return cls(
            storage=weak_storage(tensor),
            memory_start=int(tensor.storage_offset()),
            memory_strides=tensor.stride(),
            view=view,
            tensor=None if is_copy else weakref.ref(tensor),
        )

    @property
    def is_alive(self) -> bool:
        return not self.storage.expired()  # type: ignore[no-untyped-call]

    @property
    def is_valid(self) -> bool:
        # Whether the parameter itself is still in that memory.
        tensor = None if self.tensor is None else self.tensor()
        return tensor is not None and storage_key(tensor) == self.storage.cdata

    @cached_property
    def memory_stop(self) -> int:
        # One past the last place in memory.
        steps = ((n - 1) * step for n, step in zip(self.view.shape, self.memory_strides, strict=True))
        return self.memory_start + sum(steps) + 1

    def holds(self, memory: int) -> bool:
        return self.memory_start <= memory < self.memory_stop

    def overlaps(self, other: "_Layout") -> bool:
        # Whether two tensors in the same storage have places in common; their spans are compared.
        return self.memory_start < other.memory_stop and other.memory_start < self.memory_stop

    def entry(self, memory: int) -> int:
        # Index in the flattened parameter of what stands at a place in memory.
        rest, entry = memory - self.memory_start, self.view.start
        for step, stride in self._steps:
            position, rest = divmod(rest, step)
            entry += position * stride
        return entry

    @cached_property
    def _steps(self) -> list[tuple[int, int]]:
        # Of the dimensions in which there is a way to go, in memory and in the parameter, the longest first.
        dimensions = zip(self.memory_strides, self.view.shape, self.view.strides, strict=True)
        return [(step, stride) for step, size, stride in sorted(dimensions, reverse=True) if size > 1 and step]


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def _seen_through(layout: _Layout, tensor: Tensor) -> ParameterView | None:
    # What a view of that memory shows of the parameter; None if its entries are not evenly spaced.
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
    return replace(layout.view, start=start, shape=tuple(tensor.shape), strides=tuple(steps))


class TensorTracker:
    """Follows parameters through views, casts, copies and elementwise maps.

    Views are recognised by the memory they share; copies are remembered as long as they live.

    Attributes:
        scattered: Names of parameters of which an unevenly spaced view was met.
    """

    def __init__(self) -> None:
        self._own: set[int] = set()
        self._sizes: dict[str, int] = {}
        self._layouts: dict[int, list[_Layout]] = {}
        self.scattered: set[str] = set()

    def track(self, tensor: Tensor, name: str, *, is_computed: bool = False) -> None:
        """Take a tensor for a whole weight, as long as it lives.

        It may be in memory that held another before: backends free parameters and fetch others into their place. Of two
        that are in the same memory at once, the first counts.

        Args:
            tensor: A parameter, or what is computed in place of one.
            name: Canonical name.
            is_computed: Whether it is computed, so that the model may change it without changing a parameter.
        """
        shape, key = tuple(tensor.shape), storage_key(tensor)
        view = ParameterView(parameter=name, start=0, shape=shape, strides=_contiguous(shape))
        layout = _Layout.of(tensor, view, is_copy=False)
        met = self._layouts.get(key, ())
        if any(known.overlaps(layout) and known.is_valid and known.view.parameter != name for known in met):
            return
        self._sizes[name] = tensor.numel()
        if not is_computed:
            self._own.add(key)
        self._layouts[key] = [known for known in met if not known.overlaps(layout)] + [layout]

    def of(self, tensor: object) -> ParameterView | None:
        """Where a tensor comes from.

        Args:
            tensor: Any argument of an operation.

        Returns:
            Its view, or None if it is no view or copy of a parameter, or one whose entries are not evenly spaced.
        """
        if not isinstance(tensor, Tensor):
            return None
        layout = self._layout(tensor)
        view = None if layout is None else _seen_through(layout, tensor)
        if layout is not None and view is None:
            self.scattered.add(layout.view.parameter)
        return view

    def name_of(self, tensor: Tensor) -> str | None:
        """The parameter that a tensor is a view or copy of, evenly spaced or not.

        Args:
            tensor: Any tensor.

        Returns:
            Its canonical name, or None.
        """
        layout = self._layout(tensor)
        return None if layout is None else layout.view.parameter

    def sorted_of(self, tensor: Tensor) -> tuple[ParameterView, list[list[int]]] | None:
        """Where a tensor comes from once the indices along each dimension are put into the parameter's order.

        Summing over several dimensions at once, as einsum does, takes them in any order.

        Args:
            tensor: Any tensor.

        Returns:
            Its view when sorted, and the indices that sort it; None if that does not make it evenly spaced.
        """
        layout = self._layout(tensor)
        if layout is None or not tensor.numel():
            return None
        memory, start = int(tensor.storage_offset()), layout.entry(int(tensor.storage_offset()))
        places = [
            [layout.entry(memory + index * int(step)) - start for index in range(size)]
            for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        last = memory + sum((size - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        orders = [sorted(range(len(own)), key=own.__getitem__) for own in places]
        ordered = [sorted(own) for own in places]
        steps = [own[1] - own[0] if len(own) > 1 else 0 for own in ordered]
        is_even = all(
            own == [own[0] + index * step for index in range(len(own))]
            for own, step in zip(ordered, steps, strict=True)
        )
        if not is_even or layout.entry(last) != start + sum(own[-1] for own in places):
            return None
        first = start + sum(own[0] for own in ordered)
        view = replace(layout.view, start=first, shape=tuple(tensor.shape), strides=tuple(steps))
        return view, orders

    def _layout(self, tensor: Tensor) -> "_Layout | None":
        layouts = self._layouts.get(storage_key(tensor))
        if layouts is None:
            return None
        start = int(tensor.storage_offset())
        return next((layout for layout in layouts if layout.holds(start)), None)

    def derive(self, result: Tensor, source: ParameterView, slope: float | Tensor = 1.0) -> None:
        """Remember that a new tensor was made of a weight, entry by entry.

        Args:
            result: A tensor with memory of its own.
            source: View of what it was made of, of the same shape.
            slope: Derivative of the map, for all entries or for each.
        """
        if isinstance(slope, float):
            self._remember(result, replace(source, factor=source.factor * slope))
            return
        size = self._sizes[source.parameter]
        slopes = torch.ones(size, device=slope.device) if source.slopes is None else source.slopes.clone()
        _, repeated = source.split()
        once = slope[tuple(0 if n in repeated else slice(None) for n in range(slope.ndim))]
        source.entries(slopes).mul_(once.to(slopes.dtype))
        self._remember(result, replace(source, slopes=slopes))

    def forget(self, tensor: Tensor) -> bool:
        """Stop following a copy that was overwritten.

        Args:
            tensor: A weight that holds something else now.

        Returns:
            False if it is no copy: a parameter that a model rescales in place is what it is multiplied with.
        """
        is_copy = storage_key(tensor) not in self._own
        if is_copy:
            del self._layouts[storage_key(tensor)]
        return is_copy

    def forget_the_dead(self) -> None:
        """Drop what is known about copies that no longer exist."""
        self._layouts = {
            key: alive
            for key, layouts in self._layouts.items()
            if (alive := [layout for layout in layouts if layout.is_alive])
        }
        self._own &= self._layouts.keys()

    def _remember(self, tensor: Tensor, view: ParameterView) -> None:
        self._layouts.setdefault(storage_key(tensor), []).append(_Layout.of(tensor, view, is_copy=True))


class DependentTensors:
    """Tensors that hold anything computed from the data, or made during the call, such as positions.

    Anything else that a weight is combined with, such as a buffer, makes another weight of it.
    """

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def start(self, tensors: Sequence[Tensor]) -> None:
        """Forget all, and begin with these.

        Args:
            tensors: What the model is given.
        """
        self._storages.clear()
        self.add(tensors)

    def add(self, tensors: Sequence[Tensor] | Iterator[Tensor]) -> None:
        """Count tensors as data.

        Args:
            tensors: Results of operations on data.
        """
        for tensor in tensors:
            key = storage_key(tensor)
            if key not in self._storages:
                self._storages[key] = weak_storage(tensor)

    def discard(self, tensor: Tensor) -> None:
        """Count a tensor as data no longer.

        Args:
            tensor: Any tensor.
        """
        self._storages.pop(storage_key(tensor), None)

    def has_any(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any of some tensors is among these.

        Args:
            tensors: The tensors.

        Returns:
            Whether one is.
        """
        return any(storage_key(tensor) in self._storages for tensor in tensors)

    def __contains__(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and storage_key(tensor) in self._storages
