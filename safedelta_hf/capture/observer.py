"""Watches every operation of a running model, and tells the collector what happens to its weights."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from typing_extensions import override

from safedelta_hf.capture.collector import MomentCollector
from safedelta_hf.capture.operations import HANDLERS, slopes_of
from safedelta_hf.capture.reader import OperationReader
from safedelta_hf.modules.names import unwrapped

aten = torch.ops.aten

VIEWS = {aten._unsafe_view.default, aten.detach.default, aten.alias.default}
"""Operations that only look elsewhere at the same memory, beside those that say so themselves."""

COPIES = {aten.clone.default, aten._to_copy.default}


@contextmanager
def every_product_visible(model: nn.Module) -> Iterator[None]:
    """Let a model compute in the plainest way it knows, with the same result.

    Fused kernels for experts and attention hide which weight meets which inputs. The product of all experts at once,
    each with its own tokens (grouped_mm), does not, and is much faster than one expert after another.

    Args:
        model: The model; its setting is put back.

    Yields:
        Nothing.
    """
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    chosen = _experts_implementation(model)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if chosen is not None and not _is_grouped(model, chosen):
            cast(Any, unwrapped(model)).set_experts_implementation("eager")
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        if chosen is not None:
            cast(Any, unwrapped(model)).set_experts_implementation(chosen)


def _experts_implementation(model: nn.Module) -> Any:  # noqa: ANN401 - transformers' own record of it
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel) or not inner._can_set_experts_implementation():
        return None
    # As `get_experts_implementation` of the model has it, which came later than `set_experts_implementation`.
    parts = {"": inner.config} | {name: getattr(inner.config, name, None) for name in inner.config.sub_configs}
    return {name: part._experts_implementation for name, part in parts.items() if part is not None}


def _is_grouped(model: nn.Module, chosen: Mapping[str, str | None]) -> bool:
    # Biases are looked up for each token there, and experts of other ranks are stood in for by others; where
    # transformers does not tell whether there are other ranks, experts are read one after another.
    experts = [module for module in unwrapped(model).modules() if hasattr(module, "_apply_gate")]
    return set(chosen.values()) <= {"grouped_mm", None} and all(
        not module.has_bias
        and not getattr(module, "_is_expert_parallel", True)
        and all(map(_can_be_grouped, module.parameters(recurse=False)))
        for module in experts
    )


def _can_be_grouped(weights: Tensor) -> bool:
    # torch has it for these types alone, and for rows and columns of whole 16 bytes.
    is_aligned = all(size * weights.element_size() % 16 == 0 for size in weights.shape[1:])
    return weights.dtype in (torch.float32, torch.bfloat16) and is_aligned


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the primitive operations of everything that runs inside it, in whichever module.

    Args:
        collector: Who is told.
        names: Names of the parameters that are followed; others, such as those of adapters, are no weights.
    """

    supports_higher_order_operators = True

    def __init__(self, collector: MomentCollector, names: Collection[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._collector = collector
        self._names = frozenset(names)
        self._reader = OperationReader(collector)
        self._paused = False

    @property
    def unsupported(self) -> dict[str, str]:
        """Why parameters that were used were not read, by name."""
        scattered = sorted(self._reader.tracker.scattered)
        return dict.fromkeys(scattered, "its entries are taken in an order of their own") | self._reader.refused

    def start_batch(self, size: int, length: int, given: Sequence[Tensor]) -> None:
        """Begin another forward pass.

        Args:
            size: Sequences in the batch.
            length: Tokens in each of them.
            given: What the model is given.
        """
        self._reader.start_batch(given)
        self._collector.start_batch(size, length)

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, see = kwargs or {}, self._reader
        tensors = _tensors(func, *args, *kwargs.values())
        weights = [] if self._paused else [name for tensor in tensors if (name := see.name_of(tensor))]
        given = _named(func, args, kwargs) if weights else {}
        result = func(*args, **kwargs)
        if weights:
            self._tell(func, given, result, weights)
        elif func in COPIES and self._collector.shared is not None:
            self._collector.shared.copied(args[0], result)
        results = _tensors(func, result)
        if see.data.has_any(tensors):
            see.data.add(results)
        elif self._paused:
            pass  # neither weights nor what a backend makes to hold them are looked at, but data stays data
        elif not tensors:
            see.data.add(results)  # what is made of no tensor, such as positions, is made for this call
        elif weights or see.mixtures.has_any(tensors):
            see.mixtures.add(leaf for leaf in results if see.tracker.name_of(leaf) is None)
        return result

    def _tell(self, func: Any, given: Mapping[str, Any], result: Any, weights: Sequence[str]) -> None:  # noqa: ANN401
        if getattr(func, "is_view", False) or func in VIEWS:
            return
        see = self._reader
        overwritten = given.get("self") if "before" in given else None
        if overwritten is not None and (name := see.tracker.name_of(overwritten)) is not None:
            if see.tracker.forget(overwritten):
                see.refuse(name, f"a copy of it is overwritten, by {func}")
            return
        handler: Callable[..., bool] | None = HANDLERS.get(func)
        if handler is not None and handler(see, given, result):
            return
        views = [view for value in given.values() if (view := see.view(value)) is not None]
        slopes = slopes_of(func, given) if len(views) == 1 else None
        if slopes is not None:
            see.derive(result, views[0], slopes)
            return
        for name in weights:
            see.refuse(name, f"an operation that is not read, {func}, uses it")

    def track(self, tensor: Tensor, name: str) -> None:
        """Take a tensor for the whole parameter of that name, as long as it lives.

        Args:
            tensor: The parameter, in memory that may have held another before.
            name: Its canonical name.
        """
        if name in self._names:
            self._reader.track(tensor, name)

    def track_when_loaded(self, parameter: Tensor, name: str) -> None:
        """Take a parameter for the whole of that name whenever it is met with memory of its own.

        Args:
            parameter: The parameter; it may be empty meanwhile.
            name: Its canonical name.
        """
        if name in self._names:
            self._reader.track_when_loaded(parameter, name)

    def pause(self) -> None:
        """See nothing but what becomes of data, until told to look again or of what was done."""
        self._paused = True

    def resume(self) -> None:
        """See all operations again."""
        self._paused = False

    def packed_product(self, weight: str, bias: str | None, inputs: Tensor, outputs: Tensor) -> None:
        """Tell of a linear layer whose inside was not looked at, and look again.

        Args:
            weight: Canonical name of its weight.
            bias: That of its bias, if it has one.
            inputs: [..., in].
            outputs: [..., out].
        """
        self.resume()
        self._collector.packed_product(weight, bias, inputs.flatten(0, -2))
        self._reader.data.add([outputs])

    def computed_weight(self, name: str, weight: Tensor) -> None:
        """Tell of a weight that was just computed from parameters, unlooked at, and look again.

        Args:
            name: Canonical name of the weight.
            weight: The weight.
        """
        self.resume()
        self._reader.track(weight, name, is_computed=True)


def _tensors(func: Any, *values: Any) -> list[Tensor]:  # noqa: ANN401
    if not isinstance(func, OpOverload):
        return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    # Operations of a schema are given, and return, tensors and lists of tensors.
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(part for part in value if isinstance(part, Tensor))
    return found


@cache
def _defaults(func: Any) -> dict[str, Any]:  # noqa: ANN401
    schema = getattr(func, "_schema", None)
    return {} if schema is None else {argument.name: argument.default_value for argument in schema.arguments}


def _named(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    given = dict(_defaults(func))
    if not given:
        return given
    given.update(zip(given, args, strict=False))
    given.update(kwargs)
    # An operation in place overwrites what it read.
    if func._schema.is_mutable and isinstance(given.get("self"), Tensor):
        given["before"] = given["self"].clone()
    return given
