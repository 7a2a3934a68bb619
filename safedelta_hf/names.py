"""Canonical parameter names: what a checkpoint calls a weight, whatever wraps the model in memory."""

from torch import nn

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def canonical(name: str) -> str:
    """Strip what torch.compile, FSDP and checkpoint wrappers insert into a name.

    Args:
        name: Name of a parameter or module as the wrapped model gives it.

    Returns:
        The name in the bare model.
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def join(module: str, attribute: str) -> str:
    """Name of a module's own attribute.

    Args:
        module: Name of the module, empty for the root.
        attribute: Name of its parameter.

    Returns:
        The dotted name.
    """
    return f"{module}.{attribute}" if module else attribute


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The one name by which each parameter is known, that of its first appearance.

    Args:
        model: Any module.

    Returns:
        Canonical names by parameter; a tied parameter has one entry.
    """
    return {parameter: canonical(name) for name, parameter in model.named_parameters()}


def parameter_aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The further names of tied parameters.

    Args:
        model: Any module.

    Returns:
        The other canonical names of each parameter, by its first; empty where there are none.
    """
    names = parameter_names(model)
    aliases: dict[str, tuple[str, ...]] = dict.fromkeys(names.values(), ())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if canonical(name) != names[parameter]:
            aliases[names[parameter]] += (canonical(name),)
    return aliases
