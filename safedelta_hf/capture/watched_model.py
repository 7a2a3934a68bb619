"""A model whose weights are watched while it reads data, packed and computed ones too."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.capture.observer import Observer
from safedelta_hf.core.finite import is_finite
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import CaptureError, ConfigurationError, NumericalError
from safedelta_hf.modules.evaluating import evaluating
from safedelta_hf.modules.names import base_modules, class_name, embeddings, parameter_names, unwrapped
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
            after = _told_to(observer, name, names[weight], None if bias is None else names[bias])
            hooks.callback(module.register_forward_pre_hook(lambda *_: observer.pause()).remove)
            hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


def _packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in base_modules(model):
        if isinstance(module, nn.Linear) and is_quantised(module.weight):
            yield name, module


def _told_to(observer: Observer, name: str, weight: str, bias: str | None) -> Callable[..., None]:
    def after(module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor) -> None:
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        # A packed weight is not read; what its class says of its widths is compared with what passes through it.
        if (inputs.shape[-1], outputs.shape[-1]) != (module.in_features, module.out_features):
            raise CaptureError(
                f"{name}: this {type(module).__name__} of {module.in_features} inputs and {module.out_features} "
                f"outputs turned {inputs.shape[-1]} into {outputs.shape[-1]}; leave it out of the targets"
            )
        observer.packed_product(weight, bias, inputs, outputs)

    return after


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
        matrices: Something of the shape and device of each weight that is watched, by canonical name.
        chosen: Names of those whose products are read.
        computed: Its weights that are computed from parameters and watched as one, by canonical name.
        obstacles: Why others are not, by the name of each parameter that they are computed from.
    """

    model: ShardedModel
    module: nn.Module
    matrices: Mapping[str, Tensor]
    chosen: frozenset[str]
    computed: Mapping[str, ParametrisedWeight]
    obstacles: Mapping[str, str]

    @classmethod
    def of(cls, model: ShardedModel, config: ProfileConfig) -> "WatchedModel":
        """Look at a model, and make sure that it can be read with.

        Args:
            model: The base model.
            config: Which linear weights are read.

        Returns:
            The model, with what is watched of it.

        Raises:
            CaptureError: It is an encoder-decoder model.
            NumericalError: A weight holds NaN or Inf.
            ConfigurationError: It is sharded, and has weights that are computed from parameters.
        """
        module = model.model if model.collective else unwrapped(model.model)
        _require_one_sequence(module)
        _require_finite(model)
        if not model.is_local and (parametrised := parametrised_weights(module)):
            raise ConfigurationError(
                f"{next(iter(parametrised))}: is computed from other parameters, which is not covered in a model under "
                f"{model.kind}. Train without the callback, then use adjust_model on the saved model"
            )
        with evaluating(module):
            computed, obstacles = _computed_weights(module)
        names = parameter_names(module)
        packed = {
            names[layer.get_parameter("weight")]: (layer.out_features, layer.in_features)
            for _, layer in _packed_layers(module)
        }
        inside = {original for weight in computed.values() for original in weight.originals}
        matrices = {
            name: torch.empty((), device=model.device(name)).expand(packed.get(name) or model.shape(name))
            for name in model.names
            if name not in inside
        }
        matrices |= {name: weight.shaped() for name, weight in computed.items()}
        chosen = frozenset(filter(config.targets_include, matrices))
        return cls(model=model, module=module, matrices=matrices, chosen=chosen, computed=computed, obstacles=obstacles)

    @property
    def head(self) -> str | None:
        """Name of the output projection's weight, if the model has one."""
        return _head(self.module, self.computed.values())

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
        computed_from = {original: name for name, weight in self.computed.items() for original in weight.originals}
        reasons = {}
        for parameter, name in parameter_names(self.module).items():
            weight = computed_from.get(name, name)
            if weight not in used:
                kind = type(owners[parameter]).__name__
                unreached = f"the safety data never reached it, unless inside a fused kernel, in {kind}"
                reasons[name] = self.obstacles.get(name) or unsupported.get(weight, unreached)
        return reasons


def _computed_weights(model: nn.Module) -> tuple[dict[str, ParametrisedWeight], dict[str, str]]:
    computed: dict[str, ParametrisedWeight] = {}
    obstacles: dict[str, str] = {}
    for name, weight in parametrised_weights(model).items():
        obstacle = weight.obstacle()
        if obstacle:
            obstacles |= dict.fromkeys(weight.originals, f"{name} is computed from it, and {obstacle}")
        else:
            computed[name] = weight
    return computed, obstacles


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
    return is_quantised(model.live(name)) or is_finite(model.read(name))


def _head(model: nn.Module, computed: Iterable[ParametrisedWeight]) -> str | None:
    layer = embeddings(model, "output")
    if layer is None:
        return None
    own = dict(layer.named_parameters(recurse=False))  # its attribute may be computed, and that is not asked for here
    if "weight" in own:
        return parameter_names(model).get(own["weight"])
    return next((weight.name for weight in computed if weight.owner is layer and weight.key == "weight"), None)
