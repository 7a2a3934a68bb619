"""Which parameter a tensor is a view or a copy of, and which of its entries it shows."""

from dataclasses import replace

import torch
from torch import Tensor

from safedelta_hf.capture.identity import storage_key
from safedelta_hf.capture.origin import Layout, Origin, contiguous, seen_through


class Origins:
    """Follows parameters through views, casts, copies and elementwise maps.

    Views are recognised by the memory they share; copies are remembered as long as they live.

    Attributes:
        scattered: Names of parameters of which an unevenly spaced view was met.
    """

    def __init__(self) -> None:
        self._own: set[int] = set()
        self._sizes: dict[str, int] = {}
        self._layouts: dict[int, list[Layout]] = {}
        self.scattered: set[str] = set()

    def follow(self, tensor: Tensor, name: str, *, is_computed: bool = False) -> None:
        """Take a tensor for a whole weight, as long as it lives.

        It may be in memory that held another before: backends free parameters and fetch others into their place. Of two
        that are in the same memory at once, the first counts.

        Args:
            tensor: A parameter, or what is computed in place of one.
            name: Canonical name.
            is_computed: Whether it is computed, so that the model may change it without changing a parameter.
        """
        shape, key = tuple(tensor.shape), storage_key(tensor)
        origin = Origin(parameter=name, start=0, shape=shape, strides=contiguous(shape))
        layout = Layout.of(tensor, origin, is_copy=False)
        met = self._layouts.get(key, ())
        if any(known.overlaps(layout) and known.is_valid and known.origin.parameter != name for known in met):
            return
        self._sizes[name] = tensor.numel()
        if not is_computed:
            self._own.add(key)
        self._layouts[key] = [known for known in met if not known.overlaps(layout)] + [layout]

    def of(self, tensor: object) -> Origin | None:
        """Where a tensor comes from.

        Args:
            tensor: Any argument of an operation.

        Returns:
            Its origin, or None if it is no view or copy of a parameter, or one whose entries are not evenly spaced.
        """
        if not isinstance(tensor, Tensor):
            return None
        layout = self._layout(tensor)
        origin = None if layout is None else seen_through(layout, tensor)
        if layout is not None and origin is None:
            self.scattered.add(layout.origin.parameter)
        return origin

    def name_of(self, tensor: Tensor) -> str | None:
        """The parameter that a tensor is a view or copy of, evenly spaced or not.

        Args:
            tensor: Any tensor.

        Returns:
            Its canonical name, or None.
        """
        layout = self._layout(tensor)
        return None if layout is None else layout.origin.parameter

    def sorted_of(self, tensor: Tensor) -> tuple[Origin, list[list[int]]] | None:
        """Where a tensor comes from once the indices along each dimension are put into the parameter's order.

        Summing over several dimensions at once, as einsum does, takes them in any order.

        Args:
            tensor: Any tensor.

        Returns:
            Its origin when sorted, and the indices that sort it; None if that does not make it evenly spaced.
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
        origin = replace(layout.origin, start=first, shape=tuple(tensor.shape), strides=tuple(steps))
        return origin, orders

    def _layout(self, tensor: Tensor) -> "Layout | None":
        start = int(tensor.storage_offset())
        layouts = self._layouts.get(storage_key(tensor), ())
        return next((layout for layout in layouts if layout.holds(start)), None)

    def derive(self, result: Tensor, source: Origin, slope: float | Tensor = 1.0) -> None:
        """Remember that a new tensor was made of a weight, entry by entry.

        Args:
            result: A tensor with memory of its own.
            source: Origin of what it was made of, of the same shape.
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

    def _remember(self, tensor: Tensor, origin: Origin) -> None:
        self._layouts.setdefault(storage_key(tensor), []).append(Layout.of(tensor, origin, is_copy=True))
