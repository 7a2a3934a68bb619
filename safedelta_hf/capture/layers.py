"""Which parameters can be observed, and through which module."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safedelta_hf.errors import CaptureError
from safedelta_hf.names import base_modules, join, unwrapped
from safedelta_hf.quantised import is_quantised
from safedelta_hf.records import Role


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A module whose inputs tell the curvature of its parameters.

    Attributes:
        module: The module.
        role: Role of its `weight`.
        weight: Its weight.
        bias: Its bias, if it has one.
    """

    module: nn.Module
    role: Role
    weight: nn.Parameter
    bias: nn.Parameter | None


class NormProbe:
    """Reads off the normalised input of a norm layer from how its output depends on the scale.

    The output is affine in the scale, `f(g) = f(0) + g * x_hat`, for LayerNorm, RMSNorm and the `1 + g` variants alike,
    so `x_hat = f(1) - f(0)`, whatever the class calls its constants. Copies with those scales are asked.

    Args:
        module: A module whose own parameters are a 1-D `weight` and possibly a `bias`.
    """

    def __init__(self, module: nn.Module) -> None:
        own = dict(module.named_parameters(recurse=False))
        self._scale, self._bias = own["weight"], own.get("bias")
        self._ones, self._zeros = (_with_scale(module, value) for value in (1.0, 0.0))
        self._verified = False

    def normalised(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Any) -> Tensor:  # noqa: ANN401
        """The normalised input.

        Args:
            args: Positional arguments of the call; the first argument is the input, [..., features].
            kwargs: Keyword arguments of the call.
            outputs: What the module made of them, [..., features].

        Returns:
            `x_hat` [..., features], float32.

        Raises:
            CaptureError: The output is not an elementwise scale of the input.
        """
        inputs = first_argument(args, kwargs)
        shapes = [getattr(value, "shape", None) for value in (inputs, outputs)]
        if shapes[0] is None or shapes[0] != shapes[1] or shapes[0][-1:] != self._scale.shape:
            raise CaptureError("its scale does not run over the last dimension of its input")
        at_zero: Tensor = self._zeros(*args, **kwargs).float()
        unit: Tensor = self._ones(*args, **kwargs).float() - at_zero
        if not self._verified:
            bias = 0.0 if self._bias is None else self._bias.float()
            _require_close(at_zero + unit * self._scale.float() + bias, outputs, "an elementwise scale of its input")
            self._verified = True
        return unit


class LinearProbe:
    """Makes sure that a subclass of a linear layer computes what its weight says.

    Args:
        layer: A layer with the role of a linear one.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._verified = type(layer.module).forward in (nn.Linear.forward, Conv1D.forward)

    def verify(self, inputs: Tensor, outputs: Any) -> None:  # noqa: ANN401
        """Compare the first call with `x W^T + b`.

        Args:
            inputs: What the layer read, [..., in].
            outputs: What it made of it, [..., out].

        Raises:
            CaptureError: It is something else.
        """
        if self._verified:
            return
        if is_quantised(self._layer.weight):
            self._verify_width(inputs, outputs)
            return
        weight = self._layer.weight.T if self._layer.role is Role.CONV1D else self._layer.weight
        if weight.ndim != 2 or inputs.shape[-1] != weight.shape[1]:
            raise CaptureError("its input does not have the width of its weight")
        expected = nn.functional.linear(inputs, weight.to(inputs.dtype), self._layer.bias)
        _require_close(expected.float(), outputs, "the product of its input and its weight")
        self._verified = True

    def _verify_width(self, inputs: Tensor, outputs: Any) -> None:  # noqa: ANN401
        # A packed weight is not read; what its class says of its widths is compared with what passes through it.
        module = self._layer.module
        widths = [inputs.shape[-1], getattr(outputs, "shape", (None,))[-1]]
        if widths != [module.in_features, module.out_features]:
            raise CaptureError("its input or output does not have the width of its weight")
        self._verified = True


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The input of a layer, however it was passed.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The first of them, or None if there are none.
    """
    return args[0] if args else next(iter(kwargs.values()), None)


def find_layers(model: nn.Module) -> tuple[list[Layer], dict[str, str]]:
    """List the layers whose parameters the method can cover, and why the others cannot be.

    Args:
        model: Any module.

    Returns:
        The layers in module order, and the reason by canonical name of each parameter left out.
    """
    head = _output_embeddings(model)
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    for name, module in base_modules(model):
        own = dict(module.named_parameters(recurse=False))
        role = Role.HEAD if module is head else _role(module, own)
        kind = type(module).__name__
        if role is not None:
            layers.append(Layer(module=module, role=role, weight=own.pop("weight"), bias=own.pop("bias", None)))
        reason = (
            f"{kind} is not a layer that the method covers" if role is None else f"neither weight nor bias of {kind}"
        )
        skipped.update({join(name, key): reason for key in own})
    return layers, skipped


def _role(module: nn.Module, own: Mapping[str, nn.Parameter]) -> Role | None:
    weight = own.get("weight")
    if weight is None:
        return None
    if isinstance(module, nn.Linear):
        return Role.LINEAR
    if is_quantised(weight):
        return None
    if isinstance(module, Conv1D):
        return Role.CONV1D
    if isinstance(module, nn.Embedding):
        return Role.EMBEDDING
    is_scale = weight.ndim == 1 and set(own) <= {"weight", "bias"} and not list(module.children())
    return Role.SCALE if is_scale else None


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    head = unwrapped(head) if isinstance(head, nn.Module) else None
    return head if isinstance(head, nn.Linear) else None


def _with_scale(module: nn.Module, value: float) -> nn.Module:
    probe = copy.deepcopy(module)
    with torch.no_grad():
        for key, parameter in probe.named_parameters(recurse=False):
            parameter.fill_(value if key == "weight" else 0.0)
    return probe.eval()


def _require_close(expected: Tensor, outputs: Any, description: str) -> None:  # noqa: ANN401
    if not isinstance(outputs, Tensor) or outputs.shape != expected.shape:
        raise CaptureError(f"its output is not {description}")
    if not torch.isfinite(outputs).all():
        return  # NaN is reported with the name of the layer once the moments are complete
    tolerance = 1e-3 if outputs.dtype is torch.float32 and not torch.is_autocast_enabled(outputs.device.type) else 0.05
    if (expected - outputs.float()).norm() > tolerance * outputs.float().norm().clamp_min(1e-6):
        raise CaptureError(f"its output is not {description}")
