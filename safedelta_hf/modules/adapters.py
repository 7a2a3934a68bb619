"""Adapters on a model, whichever library put them there: PEFT itself, or transformers, which knows only its own."""

from typing import Any

from torch import nn

from safedelta_hf.errors import ConfigurationError


def active_adapters(model: nn.Module) -> list[str]:
    """Name the adapters that a model computes with.

    Args:
        model: A model of PEFT, or one whose adapters transformers or `peft.inject_adapter_in_model` added.

    Returns:
        Names in the order of activation; empty if it has none.
    """
    names: Any = getattr(model, "active_adapters", ())
    if not callable(names):
        return list(names)
    # What transformers offers is a method, which knows only adapters that transformers added, and asks for the newest
    # PEFT; the layers know their own.
    return list(dict.fromkeys(name for layer in tuner_layers(model) for name in layer.active_adapters))


def tuner_layers(model: nn.Module) -> list[Any]:
    """List the layers that adapters are on.

    Args:
        model: Any model.

    Returns:
        PEFT's layers, in module order.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def trained_adapter(model: nn.Module, owner: str) -> str | None:
    """Name of the adapter that is being trained.

    Args:
        model: The bare model.
        owner: The callback that works on it, for errors.

    Returns:
        Its name, or None if the model has no adapters.

    Raises:
        ConfigurationError: Several adapters are active at once.
    """
    if not getattr(model, "peft_config", None):
        return None
    names = active_adapters(model)
    if len(names) != 1:
        raise ConfigurationError(
            f"{owner}: works on one adapter, and {len(names)} are active: {names}; activate the one that is trained "
            "with set_adapter(name)"
        )
    return names[0]
