"""Backends whose own hooks fetch parameters just before a module runs, and free them after it."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from safedelta_hf.distributed.model import Places, Watcher


@contextmanager
def fetched_by_hooks(model: nn.Module, places: Places, watcher: Watcher) -> Iterator[None]:
    """Show a watcher each parameter once it is fetched, and none of the work of the backend's hooks.

    Hooks of ours stand before and behind all others of each module: those in front make the watcher look away, those
    behind let it look again. When a module is about to run, all that was fetched of it and of the modules inside it is
    shown, because a module may use the weights of another without calling it.

    Args:
        model: The model.
        places: Where its parameters stand.
        watcher: Who is told.

    Yields:
        Nothing.
    """
    own = _attributes(model, places)
    inside = {module: [place for part in module.modules() for place in own[part]] for module in model.modules()}

    def away(*_: Any) -> None:  # noqa: ANN401
        watcher.look_away()

    def again(*_: Any) -> None:  # noqa: ANN401
        watcher.look_again()

    def show(module: nn.Module, *_: Any) -> None:  # noqa: ANN401
        watcher.look_again()
        for part, key, name in inside[module]:
            tensor = part._parameters.get(key)
            if tensor is not None and _is_fetched(tensor):
                watcher.follow(tensor, name)

    for part, key, name in inside[model]:
        parameter = part._parameters[key]
        if parameter is not None and not isinstance(parameter, DTensor):
            watcher.expect(parameter, name)
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(_removed(module.register_forward_pre_hook(away, prepend=True)))
            stack.enter_context(_removed(module.register_forward_pre_hook(show)))
            stack.enter_context(_removed(module.register_forward_hook(away, prepend=True)))
            stack.enter_context(_removed(module.register_forward_hook(again)))
        yield


def _attributes(model: nn.Module, places: Places) -> dict[nn.Module, list[tuple[nn.Module, str, str]]]:
    # A tied parameter stands in several places.
    names = {places.parameter(name): name for name in places.names}
    found: dict[nn.Module, list[tuple[nn.Module, str, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter in names:
                found[module].append((module, key, names[parameter]))
    return found


def _is_fetched(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) and tensor.untyped_storage().size() > 0


@contextmanager
def _removed(handle: Any) -> Iterator[None]:  # noqa: ANN401
    try:
        yield
    finally:
        handle.remove()
