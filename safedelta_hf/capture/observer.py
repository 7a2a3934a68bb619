"""Watches every operation of a running model, and tells the collector what happens to its weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from safedelta_hf.capture.collector import MomentCollector
from safedelta_hf.capture.descendants import Descendants
from safedelta_hf.capture.operations import HANDLERS, slopes_of
from safedelta_hf.capture.origins import Origin, Origins
from safedelta_hf.records import Role

aten = torch.ops.aten

VIEWS = {aten._unsafe_view.default, aten.detach.default, aten.alias.default}
"""Operations that only look elsewhere at the same memory, beside those that say so themselves."""

COPIES = {aten.clone.default, aten._to_copy.default}


@contextmanager
def every_product_visible(model: nn.Module) -> Iterator[None]:
    """Let a model compute in the plainest way it knows, with the same result.

    Fused kernels for experts and attention hide which weight meets which inputs.

    Args:
        model: The model; its setting is put back.

    Yields:
        Nothing.
    """
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    chosen = _experts_implementation(model)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if chosen is not None:
            cast(Any, model).set_experts_implementation("eager")
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        if chosen is not None:
            cast(Any, model).set_experts_implementation(chosen)


def _experts_implementation(model: nn.Module) -> Any:  # noqa: ANN401 - transformers' own record of it
    if isinstance(model, PreTrainedModel) and model._can_set_experts_implementation():
        return model.get_experts_implementation()
    return None


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the primitive operations of everything that runs inside it, in whichever module.

    Args:
        parameters: Parameters by canonical name, but for those that are told of as computed weights.
        collector: Who is told.
    """

    supports_higher_order_operators = True

    def __init__(self, parameters: Mapping[str, nn.Parameter], collector: MomentCollector) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._origins = Origins({parameter: name for name, parameter in parameters.items()})
        self._data = Descendants()
        self._mixtures = Descendants()
        self._collector = collector
        self._unread: dict[str, str] = {}
        self._looks_away = False

    @property
    def unread(self) -> dict[str, str]:
        """Why parameters that were used were not read, by name."""
        return dict.fromkeys(self._origins.scattered, "its entries are taken in an order of their own") | self._unread

    def start_batch(self, size: int, length: int, given: Sequence[Tensor]) -> None:
        """Begin another forward pass.

        Args:
            size: Sequences in the batch.
            length: Tokens in each of them.
            given: What the model is given.
        """
        self._origins.forget_the_dead()
        self._data.start(given)
        self._mixtures.start([])
        self._collector.start_batch(size, length)

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator of any kind
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operation returns
        kwargs = kwargs or {}
        if self._looks_away:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        weights = [name for tensor in tensors if (name := self._origins.name_of(tensor)) is not None]
        given = _named(func, args, kwargs) if weights else {}
        result = func(*args, **kwargs)
        if weights:
            self._tell(func, given, result, weights)
        elif func in COPIES and self._collector.shared is not None:
            self._collector.shared.copied(args[0], result)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # What is made of no tensor, such as positions, is made for this call.
        if not tensors or any(tensor in self._data for tensor in tensors):
            self._data.add(results)
        elif weights or any(tensor in self._mixtures for tensor in tensors):
            self._mixtures.add(leaf for leaf in results if self._origins.name_of(leaf) is None)
        return result

    def _tell(self, func: Any, given: Mapping[str, Any], result: Any, weights: Sequence[str]) -> None:  # noqa: ANN401
        if getattr(func, "is_view", False) or func in VIEWS:
            return
        overwritten = given.get("self") if "before" in given else None
        if overwritten is not None and (name := self._origins.name_of(overwritten)) is not None:
            if self._origins.forget(overwritten):
                self._unread.setdefault(name, f"a copy of it is overwritten, by {func}")
            return
        handler: Callable[..., bool] | None = HANDLERS.get(func)
        if handler is not None and handler(self, given, result):
            return
        origins = [origin for value in given.values() if (origin := self._origins.of(value)) is not None]
        slopes = slopes_of(func, given) if len(origins) == 1 else None
        if slopes is not None:
            self._origins.derive(result, origins[0], slopes)
            return
        for name in weights:
            self._unread.setdefault(name, f"an operation that is not read, {func}, uses it")

    def look_away(self) -> None:
        """See nothing until a packed product or a computed weight is told."""
        self._looks_away = True

    def packed_product(self, weight: str, bias: str | None, inputs: Tensor, outputs: Tensor) -> None:
        """Tell of a linear layer whose inside was not looked at, and look again.

        Args:
            weight: Canonical name of its weight.
            bias: That of its bias, if it has one.
            inputs: [..., in].
            outputs: [..., out].
        """
        self._looks_away = False
        self._collector.packed_product(weight, bias, inputs.flatten(0, -2))
        self._data.add([outputs])

    def computed_weight(self, name: str, weight: Tensor) -> None:
        """Tell of a weight that was just computed from parameters, unlooked at, and look again.

        Args:
            name: Canonical name of the weight.
            weight: The weight.
        """
        self._looks_away = False
        self._origins.follow(weight, name)

    def origin(self, value: object) -> Origin | None:
        """Which weight a value is.

        Args:
            value: Any argument of an operation.

        Returns:
            Its origin, or None.
        """
        return self._origins.of(value)

    def sorted_origin(self, value: Tensor) -> tuple[Origin, list[list[int]]] | None:
        """Which weight a value is once its indices are sorted.

        Args:
            value: A tensor.

        Returns:
            Its origin, and the indices that sort each dimension; or None.
        """
        return self._origins.sorted_of(value)

    def is_data(self, value: object) -> bool:
        """Whether a value depends on what the model was given.

        Args:
            value: Any argument of an operation.

        Returns:
            Whether it does.
        """
        return value in self._data

    def is_constant(self, value: object) -> bool:
        """Whether a value is a tensor that depends neither on what the model was given nor on a parameter.

        Args:
            value: Any argument of an operation.

        Returns:
            Whether it is, as a buffer is.
        """
        is_made = value in self._data or value in self._mixtures
        return isinstance(value, Tensor) and not is_made and self._origins.name_of(value) is None

    def derive(self, result: Tensor, source: Origin, slope: float | Tensor) -> None:
        """Follow a weight through an elementwise map.

        Args:
            result: The new tensor.
            source: The weight.
            slope: Derivative of the map.
        """
        self._origins.derive(result, source, slope)

    def product(self, weight: Origin, inputs: Tensor, role: Role | None = None) -> None:
        """Tell of a linear map.

        Args:
            weight: [rows, columns].
            inputs: [tokens, columns]; patches for a convolution.
            role: What to call it, if not linear or the head.
        """
        if any(stride == 0 and size > 1 for stride, size in zip(weight.strides, weight.shape, strict=True)):
            self._unread.setdefault(weight.parameter, "its entries are repeated inside a product")
        elif weight.slopes is not None:
            reason = "a product uses a function of it with a slope of its own for each entry"
            self._unread.setdefault(weight.parameter, reason)
        else:
            self._collector.product(weight, inputs, role)

    def scale(self, weight: Origin, squares: Tensor, repetitions: int) -> None:
        """Tell of an elementwise product.

        Args:
            weight: Any entries.
            squares: What they are multiplied with, squared and summed.
            repetitions: How often each is used.
        """
        self._collector.scale(weight, squares, repetitions)

    def offset(self, weight: Origin, repetitions: int) -> None:
        """Tell of a sum.

        Args:
            weight: Any entries.
            repetitions: How often each is added.
        """
        self._collector.offset(weight, repetitions)

    def lookup(self, weight: Origin, rows: Tensor) -> None:
        """Tell of a lookup.

        Args:
            weight: A table [rows, features].
            rows: Which rows.
        """
        if self._collector.is_table(weight):
            self._collector.lookup(weight, rows)
        else:
            self._unread.setdefault(weight.parameter, "a part of it is looked up by row")


def _named(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    schema = getattr(func, "_schema", None)
    if schema is None:
        return {}
    given = {argument.name: argument.default_value for argument in schema.arguments}
    given.update(zip(given, args, strict=False))
    given.update(kwargs)
    # An operation in place overwrites what it read.
    if schema.is_mutable and isinstance(given.get("self"), Tensor):
        given["before"] = given["self"].clone()
    return given
