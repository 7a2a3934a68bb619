"""Which parameters can be observed, and through which module."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safedelta_hf.errors import CaptureError
from safedelta_hf.names import canonical, join
from safedelta_hf.records import Role


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A module whose inputs tell the curvature of its parameters.

    Attributes:
        name: Canonical module name.
        module: The module.
        role: Role of its `weight`.
        weight: Its weight.
        bias: Its bias, if it has one.
    """

    name: str
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

    def normalised(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The normalised input.

        Args:
            inputs: [..., features].
            outputs: What the module made of them, [..., features].

        Returns:
            `x_hat` [..., features], float32.

        Raises:
            CaptureError: The output is not an elementwise scale of the input.
        """
        if outputs.shape != inputs.shape or outputs.shape[-1:] != self._scale.shape:
            raise CaptureError("its scale does not run over the last dimension of its input")
        at_zero: Tensor = self._zeros(inputs).float()
        unit: Tensor = self._ones(inputs).float() - at_zero
        if not self._verified:
            expected = at_zero + unit * self._scale.float() + (0.0 if self._bias is None else self._bias.float())
            tolerance = 0.05 if outputs.dtype in (torch.bfloat16, torch.float16) else 1e-3
            size = outputs.float().norm().clamp_min(1e-6)
            if not (expected - outputs.float()).norm() <= tolerance * size and torch.isfinite(outputs).all():
                raise CaptureError("its output is not an elementwise scale of a normalised input")
            self._verified = True
        return unit


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
    for name, module in _named_modules(model):
        own = dict(module.named_parameters(recurse=False))
        role = Role.HEAD if module is head else _role(module, own)
        kind = type(module).__name__
        if role is not None:
            layers.append(
                Layer(name=name, module=module, role=role, weight=own.pop("weight"), bias=own.pop("bias", None))
            )
        reason = (
            f"{kind} is not a layer that the method covers" if role is None else f"neither weight nor bias of {kind}"
        )
        skipped.update({join(name, key): reason for key in own})
    return layers, skipped


def _role(module: nn.Module, own: Mapping[str, nn.Parameter]) -> Role | None:
    weight = own.get("weight")
    if weight is None or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        return Role.LINEAR
    if isinstance(module, Conv1D):
        return Role.CONV1D
    if isinstance(module, nn.Embedding):
        return Role.EMBEDDING
    is_scale = weight.ndim == 1 and set(own) <= {"weight", "bias"} and not list(module.children())
    return Role.SCALE if is_scale else None


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        yield canonical(f"{name}.").rstrip("."), module


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Linear) else None


def _with_scale(module: nn.Module, value: float) -> nn.Module:
    probe = copy.deepcopy(module)
    with torch.no_grad():
        for key, parameter in probe.named_parameters(recurse=False):
            parameter.fill_(value if key == "weight" else 0.0)
    return probe.eval()
