"""Canonical parameter names: what a checkpoint calls a weight, whatever wraps the model in memory."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from safedelta_hf.errors import ConfigurationError

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Where torch.compile, FSDP1 and the wrappers of activation checkpointing keep the module that they wrap."""

_WRAPPED = ("token_adapter", "base_layer", "original_module")
"""Where the wrappers of PEFT keep the module that they wrap."""

_MAKERS = {
    "base_model.model.": "PEFT",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "module.": "data parallelism",
}
"""Who puts a name before those of a model's parameters."""

ADAPTER_PREFIX = "base_model.model."
"""What stands before the name of every weight in the files of an adapter."""


def canonical(name: str) -> str:
    """Strip what torch.compile, FSDP and checkpoint wrappers insert into a name.

    Args:
        name: Name of a parameter or module as the wrapped model gives it.

    Returns:
        The name in the bare model.
    """
    for wrapper in _WRAPPERS:
        name = name.replace(f"{wrapper}.", "")
    return name


def wrapping_told(found: Iterable[str], wanted: Collection[str]) -> str:
    """Why names are not those that are wanted, if all of them are behind the name of a wrapper.

    Args:
        found: Names of parameters.
        wanted: Names of the same parameters of a bare model.

    Returns:
        A sentence, with what ends the one before it; empty if it is something else.
    """
    names = set(found)
    parts = min(names, default="").split(".")
    for place in range(1, len(parts)):
        prefix = ".".join(parts[:place]) + "."
        bare = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if len(bare) == len(names) and not bare.isdisjoint(wanted):
            maker = next((maker for part, maker in _MAKERS.items() if part in prefix), "what wraps the model")
            return f". Names here begin with {prefix!r}, put there by {maker}: give what is wrapped, or save that"
    return ""


def join(module: str, attribute: str) -> str:
    """Name of a module's own attribute.

    Args:
        module: Name of the module, empty for the root.
        attribute: Name of its parameter.

    Returns:
        The dotted name.
    """
    return f"{module}.{attribute}" if module else attribute


def unwrapped(module: nn.Module) -> nn.Module:
    """What the wrappers of PEFT, FSDP and data parallelism wrap: the model that has an adapter, the layer below it.

    Args:
        module: Any module.

    Returns:
        The module itself if nothing wraps it.
    """
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module


def embeddings(model: nn.Module, side: Literal["input", "output"]) -> nn.Module | None:
    """The layer that a model looks tokens up in, or that it predicts them with.

    Args:
        model: Any model.
        side: Which of the two.

    Returns:
        The layer, without what wraps it; None if the model names none.
    """
    getter = getattr(model, f"get_{side}_embeddings", None)
    layer = None
    with suppress(NotImplementedError):  # as transformers says it of a model without text
        layer = getter() if callable(getter) else None
    return unwrapped(layer) if isinstance(layer, nn.Module) else None


def hub_name(model: nn.Module) -> tuple[str | None, str | None]:
    """Where on the Hub a model was loaded from.

    Args:
        model: Any module.

    Returns:
        Repository and commit; None for what is not known, as of a model from a folder, whose place tells nobody else
        anything.
    """
    config = getattr(unwrapped(model), "config", None)
    name = getattr(config, "_name_or_path", None)
    if not is_hub_name(name):
        return None, None
    return name, getattr(config, "_commit_hash", None)


def is_hub_name(name: object) -> bool:
    """Whether something can be the name of a repository on the Hub, and is no folder.

    Args:
        name: The name.

    Returns:
        Whether it can.
    """
    if not isinstance(name, str) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def class_name(model: nn.Module) -> str:
    """Name of a model's class, whatever wraps the model.

    Args:
        model: Any module.

    Returns:
        The name that the class has in its library; FSDP2 gives a sharded model a class of its own.
    """
    bare = (kind for kind in type(unwrapped(model)).__mro__ if not issubclass(kind, FSDPModule))
    return next(bare).__name__


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """Take what torch.compile, FSDP1 and checkpointing wrap around modules out of a model, as long as the block runs.

    Libraries find weights by the names of the modules that hold them, and a wrapper is part of those names. Nothing can
    be computed meanwhile where parameters are sharded.

    Args:
        model: Any module.

    Yields:
        The model with the modules that it was built of.
    """
    wrapped = [
        (module, key, child)
        for module in model.modules()
        for key, child in module._modules.items()
        if child is not None and _inside(child) is not child
    ]
    try:
        for module, key, child in wrapped:
            module._modules[key] = _inside(child)
        yield _inside(model)
    finally:
        for module, key, child in wrapped:
            module._modules[key] = child


def base_modules(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the bare model, without those of adapters on it.

    Args:
        model: Any module.
        every_name: Whether a module that stands in several places comes once for each of them.

    Yields:
        Canonical name and module, a module before those inside it.
    """
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if module in seen:
            return
        if not every_name:
            seen.add(module)
        yield canonical(f"{name}.").rstrip("."), module
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(join(name, key), child)

    yield from walk("", model)


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The one name by which each parameter of the bare model is known, that of its first appearance.

    Args:
        model: Any module; parameters of adapters on it are left out.

    Returns:
        Canonical names by parameter; a tied parameter has one entry.
    """
    names: dict[nn.Parameter, str] = {}
    for name, module in base_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, join(name, key))
    return names


def parameter_aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The further names of tied parameters.

    Args:
        model: Any module.

    Returns:
        The other canonical names of each parameter, by its first; empty where there are none.
    """
    names = parameter_names(model)
    aliases: dict[str, tuple[str, ...]] = dict.fromkeys(names.values(), ())
    for place, module in base_modules(model, every_name=True):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if (name := join(place, key)) != names[parameter]:
                aliases[names[parameter]] += (name,)
    return aliases


def _inside(module: nn.Module) -> nn.Module:
    while (inner := next((module._modules[key] for key in _WRAPPERS if key in module._modules), None)) is not None:
        module = inner
    return module


def _wrapped(module: nn.Module) -> nn.Module | None:
    if isinstance(module, FullyShardedDataParallel | DistributedDataParallel):
        inside: nn.Module = module.module
        return inside
    inner_model = getattr(module, "get_base_model", None)
    if callable(inner_model):
        model: nn.Module = inner_model()
        return model
    if not hasattr(module, "adapter_layer_names"):
        return None
    return next((inner for key in _WRAPPED if (inner := module._modules.get(key)) is not None), None)


def bare(model: nn.Module | None, owner: str) -> nn.Module:
    """The model without what `torch.compile` wraps around it.

    Args:
        model: As a callback of the Trainer received it.
        owner: The callback, for errors.

    Returns:
        The module that holds the parameters.

    Raises:
        ConfigurationError: There is none.
    """
    if model is None:
        raise ConfigurationError(f"{owner}: the Trainer passed no model")
    bare: nn.Module = getattr(model, "_orig_mod", model)
    return bare
