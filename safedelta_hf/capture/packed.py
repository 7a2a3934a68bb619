"""Linear layers with a packed weight: no operation multiplies it as a matrix, so the module is watched."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from safedelta_hf.capture.observer import Observer
from safedelta_hf.errors import CaptureError
from safedelta_hf.names import base_modules, parameter_names
from safedelta_hf.quantised import is_quantised


@contextmanager
def packed_products(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Tell an observer what layers with a packed weight read; what they compute inside is not looked at.

    Args:
        model: Any model, as those of bitsandbytes and torchao; others have no such layers.
        observer: Who is told.

    Yields:
        Nothing.
    """
    names = parameter_names(model)
    with ExitStack() as hooks:
        for name, module in base_modules(model):
            if isinstance(module, nn.Linear) and is_quantised(module.weight):
                weight, bias = (module.get_parameter("weight"), module.bias)
                hook = _Packed(name, names[weight], None if bias is None else names[bias], observer)
                hooks.callback(module.register_forward_pre_hook(hook.before).remove)
                hooks.callback(module.register_forward_hook(hook.after, with_kwargs=True).remove)
        yield


class _Packed:
    def __init__(self, name: str, weight: str, bias: str | None, observer: Observer) -> None:
        self._name, self._weight, self._bias, self._observer = name, weight, bias, observer

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._observer.look_away()

    def after(self, module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor) -> None:
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        # A packed weight is not read; what its class says of its widths is compared with what passes through it.
        if (inputs.shape[-1], outputs.shape[-1]) != (module.in_features, module.out_features):
            raise CaptureError(
                f"{self._name}: this {type(module).__name__} of {module.in_features} inputs and {module.out_features} "
                f"outputs turned {inputs.shape[-1]} into {outputs.shape[-1]}; leave it out of the targets"
            )
        self._observer.packed_product(self._weight, self._bias, inputs, outputs)
