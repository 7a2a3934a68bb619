"""Fine-tuning with the safety layers frozen: safely partial-parameter fine-tuning, SPPFT (arXiv 2408.17003, sec. 4)."""

import copy
from typing import Any, Final

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ArchitectureError, BaseWeightsError, ConfigurationError
from safedelta_hf.modules.decoder_layers import decoder_layers
from safedelta_hf.modules.names import canonical
from safedelta_hf.training.safety_layers import SafetyLayers
from safedelta_hf.weights.digest import parameter_digest

_CHOOSING: Final = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
"""Fields of a `LoraConfig` that choose layers, or cannot be kept to some of them."""


def freeze_layers(model: nn.Module, layers: SafetyLayers) -> tuple[str, ...]:
    """Let no parameter of the safety layers be trained; to be called before the Trainer is made.

    Args:
        model: The model, with or without adapters; those inside of these layers are frozen too.
        layers: Its safety layers.

    Returns:
        Names of the parameters that are frozen now.

    Raises:
        ArchitectureError: The model has other layers.
    """
    parameters = _parameters_of(model, layers)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return tuple(parameters)


def _parameters_of(model: nn.Module, layers: SafetyLayers) -> dict[str, nn.Parameter]:
    names = tuple(name for name, _ in decoder_layers(model))
    if names != layers.names:
        raise ArchitectureError(
            f"the model has {len(names)} decoder layers, {names[0]} and following; the safety layers were located in "
            f"one with {len(layers.names)}, {layers.names[0]} and following"
        )
    modules = dict(decoder_layers(model))
    chosen = {
        parameter: f"{names[number]}.{canonical(key)}"
        for number in layers.numbers
        for key, parameter in modules[names[number]].named_parameters()
    }
    return {name: parameter for parameter, name in chosen.items()}


def lora_layers(layers: SafetyLayers, config: Any) -> Any:  # noqa: ANN401 - PEFT is optional
    """A LoRA configuration that leaves the safety layers alone.

    Of experts that a model holds as one parameter PEFT adapts those of all layers: there, call `freeze_layers` on the
    adapted model too, so that what it put on the safety layers stays zero; `FreezeSafetyLayers` makes sure of it.

    Args:
        layers: The safety layers.
        config: A `peft.LoraConfig`; it is not changed.

    Returns:
        A copy for all other layers: by `layers_to_transform` where the targets are listed, by `exclude_modules` where
        they are a pattern or "all-linear", which PEFT takes with no list of layers.

    Raises:
        ConfigurationError: The configuration chooses layers or exclusions itself, or targets parameters, of which PEFT
            takes those of all layers; or no other layers are left.
    """
    taken = [key for key in _CHOOSING if getattr(config, key, None)]
    if taken:
        raise ConfigurationError(
            f"{taken[0]}={getattr(config, taken[0])!r}: does not go together with safety layers, which choose the "
            "layers; leave it out"
        )
    if not layers.others:
        raise ConfigurationError(
            f"safety layers: all {len(layers.names)} layers are; nothing is left to put adapters on"
        )
    result = copy.deepcopy(config)
    place = layers.names[0].rpartition(".")[0]
    if isinstance(config.target_modules, str):
        numbers = "|".join(map(str, layers.numbers))
        result.exclude_modules = rf"(.*\.)?{place.replace('.', chr(92) + '.')}\.({numbers})\..*"
    else:
        result.layers_to_transform = list(layers.others)
        result.layers_pattern = place.rpartition(".")[2]
    return result


class FreezeSafetyLayers(TrainerCallback):
    """Makes sure that training leaves the safety layers as they are.

    At the beginning they have to be frozen (`freeze_layers`), and the optimizer must not hold them; at the end they
    have to be what they were, bit for bit.

    Args:
        layers: The safety layers.
    """

    def __init__(self, layers: SafetyLayers) -> None:
        self._layers = layers
        self._digests: dict[str, str] = {}

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None, "the Trainer passes it"
        sharded = open_model(model)
        with sharded.ranks.together():
            parameters = _parameters_of(model, self._layers)
            if trained := [name for name, parameter in parameters.items() if parameter.requires_grad]:
                raise ConfigurationError(
                    f"{trained[0]} and {len(trained) - 1} other parameters of the safety layers would be trained; call "
                    "freeze_layers(model, layers) before the Trainer is made"
                )
            groups = getattr(optimizer, "param_groups", ())
            held = {parameter for group in groups for parameter in group["params"]}
            if kept := [name for name, parameter in parameters.items() if parameter in held]:
                raise ConfigurationError(
                    f"{kept[0]}: the optimizer holds it though it is frozen; make the optimizer after freeze_layers"
                )
            self._digests = self._read(sharded)

    @override
    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None, "the Trainer passes it"
        sharded = open_model(model)
        with sharded.ranks.together():
            now = self._read(sharded)
            if changed := [name for name, found in self._digests.items() if now.get(name) != found]:
                raise BaseWeightsError(
                    f"{changed[0]} and {len(changed) - 1} other parameters of the safety layers changed in training "
                    "though they were frozen; what else writes to them?"
                )

    def _read(self, model: ShardedModel) -> dict[str, str]:
        # Those of adapters have the names of what they adapt inside of their own.
        places = [f".{self._layers.names[number]}." for number in self._layers.numbers]
        names = [name for name in model.all_names if any(place in f".{name}" for place in places)]
        return {name: parameter_digest(model, name) for name in names}
