"""A model whose weights are watched while it reads data, packed and computed ones too."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safedelta_hf.capture.config import Targets
from safedelta_hf.capture.observer import Observer
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import CaptureError, ConfigurationError, NumericalError
from safedelta_hf.modules.evaluating import evaluating
from safedelta_hf.modules.names import base_modules, class_name, parameter_names, unwrapped
from safedelta_hf.modules.parametrised import ParametrisedWeight, parametrised_weights
from safedelta_hf.modules.quantised import is_quantised


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
        for name, module in _packed_layers(model):
            weight, bias = (module.get_parameter("weight"), module.bias)
            hook = _Packed(name, names[weight], None if bias is None else names[bias], observer)
            hooks.callback(module.register_forward_pre_hook(hook.before).remove)
            hooks.callback(module.register_forward_hook(hook.after, with_kwargs=True).remove)
        yield


def _packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in base_modules(model):
        if isinstance(module, nn.Linear) and is_quantised(module.weight):
            yield name, module


class _Packed:
    def __init__(self, name: str, weight: str, bias: str | None, observer: Observer) -> None:
        self._name, self._weight, self._bias, self._observer = name, weight, bias, observer

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._observer.pause()

    def after(self, module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor) -> None:
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        # A packed weight is not read; what its class says of its widths is compared with what passes through it.
        if (inputs.shape[-1], outputs.shape[-1]) != (module.in_features, module.out_features):
            raise CaptureError(
                f"{self._name}: this {type(module).__name__} of {module.in_features} inputs and {module.out_features} "
                f"outputs turned {inputs.shape[-1]} into {outputs.shape[-1]}; leave it out of the targets"
            )
        self._observer.packed_product(self._weight, self._bias, inputs, outputs)


@dataclass(frozen=True, kw_only=True)
class ParametrisedWeights:
    """The weights of a model that are computed from parameters.

    Attributes:
        followed: Those that are watched and adjusted as one, by canonical name.
        reasons: Why others are not, by the name of each parameter that they are computed from.
    """

    followed: Mapping[str, ParametrisedWeight]
    reasons: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> "ParametrisedWeights":
        """Try which weights can be set.

        Args:
            model: The base model, evaluating.

        Returns:
            Its weights.
        """
        followed: dict[str, ParametrisedWeight] = {}
        reasons: dict[str, str] = {}
        for name, weight in parametrised_weights(model).items():
            obstacle = weight.obstacle()
            if obstacle:
                reasons |= dict.fromkeys(weight.originals, f"{name} is computed from it, and {obstacle}")
            else:
                followed[name] = weight
        return cls(followed=followed, reasons=reasons)

    @property
    def originals(self) -> dict[str, str]:
        """The weight that is followed, by the name of each parameter that it is computed from."""
        return {original: name for name, weight in self.followed.items() for original in weight.originals}


@contextmanager
def computed_weights(weights: Iterable[ParametrisedWeight], observer: Observer) -> Iterator[None]:
    """Tell an observer of weights as they are computed; how they are computed is not looked at.

    Args:
        weights: Weights of the model that runs.
        observer: Who is told.

    Yields:
        Nothing.
    """
    with ExitStack() as hooks:
        for weight in weights:
            for handle in weight.watch(observer.pause, partial(observer.computed_weight, weight.name)):
                hooks.callback(handle.remove)
        yield


@dataclass(frozen=True, kw_only=True)
class WatchedModel:
    """A model whose weights are watched.

    Attributes:
        model: The model.
        module: What is called of it: the bare model, but where forward passes are collective the outermost one, which
            has a part in them.
        targets: Which linear weights are read.
        weights: Its weights that are computed from parameters.
        matrices: Something of the shape and device of each weight that is watched, by canonical name.
    """

    model: ShardedModel
    module: nn.Module
    targets: Targets
    weights: ParametrisedWeights
    matrices: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: ShardedModel, targets: Targets) -> "WatchedModel":
        """Look at a model, and make sure that it can be read with.

        Args:
            model: The base model.
            targets: Which linear weights are read.

        Returns:
            The model, with what is watched of it.

        Raises:
            CaptureError: It is an encoder-decoder model.
            NumericalError: A weight holds NaN or Inf.
            ConfigurationError: It is sharded, and has weights that are computed from parameters.
        """  # noqa: DOC502 - raised by the functions called
        module = model.model if model.collective else unwrapped(model.model)
        _require_one_sequence(module)
        _require_finite(model)
        if not model.is_local and (computed := parametrised_weights(module)):
            raise ConfigurationError(
                f"{next(iter(computed))}: is computed from other parameters, which is not covered in a model under "
                f"{model.kind}. Train without the callback, then use adjust_model on the saved model"
            )
        with evaluating(module):
            weights = ParametrisedWeights.of(module)
        names = parameter_names(module)
        packed = {
            names[layer.get_parameter("weight")]: (layer.out_features, layer.in_features)
            for _, layer in _packed_layers(module)
        }
        matrices = {
            name: torch.empty((), device=model.device(name)).expand(packed.get(name) or model.shape(name))
            for name in model.names
            if name not in weights.originals
        }
        computed_shapes = {name: weight.shaped() for name, weight in weights.followed.items()}
        return cls(model=model, module=module, targets=targets, weights=weights, matrices=matrices | computed_shapes)

    @property
    def chosen(self) -> frozenset[str]:
        """Names of the weights whose products are read."""
        return frozenset(filter(self.targets.include, self.matrices))

    @property
    def head(self) -> str | None:
        """Name of the output projection's weight, if the model has one."""
        return _head(self.module, self.weights.followed.values())

    def reasons(self, used: Collection[str], unsupported: Mapping[str, str]) -> dict[str, str]:
        """Why parameters are not covered.

        Args:
            used: Names of the weights that are.
            unsupported: Why weights that were used were not read, by name.

        Returns:
            Reasons by name.
        """
        modules = base_modules(self.module)
        owners = {own: module for _, module in modules for own in module.parameters(recurse=False)}
        reasons = {}
        for parameter, name in parameter_names(self.module).items():
            weight = self.weights.originals.get(name, name)
            if weight not in used:
                kind = type(owners[parameter]).__name__
                unreached = f"the safety data never reached it, unless inside a fused kernel, in {kind}"
                reasons[name] = self.weights.reasons.get(name) or unsupported.get(weight, unreached)
        return reasons


def _require_one_sequence(module: nn.Module) -> None:
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise CaptureError(
            f"{class_name(module)} is an encoder-decoder model; only models that read prompt and response "
            "as one sequence are covered"
        )


def _require_finite(model: ShardedModel) -> None:
    # All are read before anything is said of one: other processes may have to take part in the reading.
    is_finite = {name: _is_finite(model, name) for name in model.all_names}
    for name, finite in is_finite.items():
        if not finite:
            raise NumericalError(f"{name}: the base model holds NaN or Inf in this weight; load an intact checkpoint")


def _is_finite(model: ShardedModel, name: str) -> bool:
    return is_quantised(model.live(name)) or bool(torch.isfinite(model.read(name)).all())


def _head(model: nn.Module, computed: Iterable[ParametrisedWeight]) -> str | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        return None
    layer = unwrapped(head)
    own = dict(layer.named_parameters(recurse=False))  # its attribute may be computed, and that is not asked for here
    if "weight" in own:
        return parameter_names(model).get(own["weight"])
    return next((weight.name for weight in computed if weight.owner is layer and weight.key == "weight"), None)
