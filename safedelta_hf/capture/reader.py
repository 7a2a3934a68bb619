"""Tells the collector what single operations do with the weights of a running model."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from safedelta_hf.capture.collector import MomentCollector
from safedelta_hf.capture.views import DependentTensors, ParameterView, TensorTracker
from safedelta_hf.records.uses import Role


class OperationReader:
    """What is known about the tensors of a running model, and who is told of what happens to its weights.

    Args:
        collector: Who is told.

    Attributes:
        tracker: Which tensors are weights.
        data: Which depend on what the model was given.
        mixtures: Which depend on parameters alone and are none.
        refused: Why parameters that were used were not read, by name.
        view: Which weight a value is, as the tracker knows it.
        sorted_view: Which weight a tensor is once its indices are sorted.
        derive: Follows a weight through an elementwise map.
        scale: Tells the collector of an elementwise product.
        offset: Tells the collector of a sum.
    """

    def __init__(self, collector: MomentCollector) -> None:
        self.tracker = TensorTracker()
        self.data = DependentTensors()
        self.mixtures = DependentTensors()
        self.refused: dict[str, str] = {}
        self._parameters: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._collector = collector
        self.view, self.sorted_view, self.derive = self.tracker.of, self.tracker.sorted_of, self.tracker.derive
        self.scale, self.offset = collector.scale, collector.offset

    def start_batch(self, given: Sequence[Tensor]) -> None:
        """Begin another forward pass.

        Args:
            given: What the model is given.
        """
        self.tracker.forget_the_dead()
        self._parameters = {key: known for key, known in self._parameters.items() if known[0]() is not None}
        self.data.start(given)
        self.mixtures.start([])

    def track(self, tensor: Tensor, name: str, *, is_computed: bool = False) -> None:
        """Take a tensor for a whole weight, as long as it lives.

        Args:
            tensor: A parameter, or what is computed in place of one.
            name: Canonical name.
            is_computed: Whether it is computed.
        """
        self.tracker.track(tensor, name, is_computed=is_computed)
        # Memory that was made for it looked like anything that is made during the call.
        self.data.discard(tensor)
        self.mixtures.discard(tensor)

    def track_when_loaded(self, parameter: Tensor, name: str) -> None:
        """Take a parameter for the whole of that name whenever it is met with memory of its own.

        Args:
            parameter: The parameter; it may be empty meanwhile.
            name: Canonical name.
        """
        self._parameters[id(parameter)] = weakref.ref(parameter), name

    def name_of(self, tensor: Tensor) -> str | None:
        """The parameter that a tensor is, or is a view or copy of.

        Args:
            tensor: Any argument of an operation.

        Returns:
            Its canonical name, or None.
        """
        name = self.tracker.name_of(tensor)
        if name is None and self._parameters:
            reference, known = self._parameters.get(id(tensor), (None, None))
            if known is not None and reference is not None and reference() is tensor:
                self.track(tensor, known)  # it was fetched into other memory than before, as it was asked for
                return known
        return name

    def refuse(self, name: str, reason: str) -> None:
        """Remember that a parameter was used in a way that is not read.

        Args:
            name: The parameter.
            reason: Why it is not; the first counts.
        """
        self.refused.setdefault(name, reason)

    def is_data(self, value: object) -> bool:
        """Whether a value depends on what the model was given.

        Args:
            value: Any argument of an operation.

        Returns:
            Whether it does.
        """
        return value in self.data

    def is_constant(self, value: object) -> bool:
        """Whether a value is a tensor that depends neither on what the model was given nor on a parameter.

        Args:
            value: Any argument of an operation.

        Returns:
            Whether it is, as a buffer is.
        """
        is_made = value in self.data or value in self.mixtures
        return isinstance(value, Tensor) and not is_made and self.tracker.name_of(value) is None

    def product(self, weight: ParameterView, inputs: Tensor, role: Role | None = None) -> None:
        """Tell of a linear map.

        Args:
            weight: [rows, columns].
            inputs: [tokens, columns]; patches for a convolution.
            role: What to call it, if not linear or the head.
        """
        if any(stride == 0 and size > 1 for stride, size in zip(weight.strides, weight.shape, strict=True)):
            self.refuse(weight.parameter, "its entries are repeated inside a product")
        elif weight.slopes is not None:
            reason = "a product uses a function of it with a slope of its own for each entry"
            self.refuse(weight.parameter, reason)
        else:
            self._collector.product(weight, inputs, role)

    def lookup(self, weight: ParameterView, rows: Tensor) -> None:
        """Tell of a lookup.

        Args:
            weight: A table [rows, features].
            rows: Which rows.
        """
        if self._collector.is_table(weight):
            self._collector.lookup(weight, rows)
        else:
            self.refuse(weight.parameter, "a part of it is looked up by row")


Arguments = Mapping[str, Any]
"""Of an operation, by name."""

Handler = Callable[[OperationReader, Arguments, Any], bool]
"""Tells what an operation does with its weights; False if it does something else with them."""
