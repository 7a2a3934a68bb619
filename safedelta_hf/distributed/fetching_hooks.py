"""Backends whose own hooks fetch parameters just before a module runs, and free them after it."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from safedelta_hf.distributed.model import ParameterObserver, ShardedModel


@contextmanager
def fetched_by_hooks(sharded: ShardedModel, observer: ParameterObserver) -> Iterator[None]:
    """Show an observer each parameter once it is fetched, and none of the work of the backend's hooks.

    Hooks of ours stand before and behind all others of each module: those in front make the observer pause, those
    behind let it resume. When a module is about to run, all that was fetched of it and of the modules inside it is
    shown, because a module may use the weights of another without calling it.

    Args:
        sharded: The model.
        observer: Who is told.

    Yields:
        Nothing.
    """
    model, own = sharded.model, _attributes(sharded)
    inside = {module: [place for part in module.modules() for place in own[part]] for module in model.modules()}

    def away(*_: Any) -> None:  # noqa: ANN401
        observer.pause()

    def again(*_: Any) -> None:  # noqa: ANN401
        observer.resume()

    def show(module: nn.Module, *_: Any) -> None:  # noqa: ANN401
        observer.resume()
        for part, key, name in inside[module]:
            tensor = part._parameters.get(key)
            if tensor is not None and _is_fetched(tensor):
                observer.track(tensor, name)

    for part, key, name in inside[model]:
        parameter = part._parameters[key]
        if parameter is not None and not isinstance(parameter, DTensor):
            observer.track_when_loaded(parameter, name)
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(_removed(module.register_forward_pre_hook(away, prepend=True)))
            stack.enter_context(_removed(module.register_forward_pre_hook(show)))
            stack.enter_context(_removed(module.register_forward_hook(away, prepend=True)))
            stack.enter_context(_removed(module.register_forward_hook(again)))
        yield


def _attributes(sharded: ShardedModel) -> dict[nn.Module, list[tuple[nn.Module, str, str]]]:
    # A tied parameter stands in several places.
    names = {sharded.live(name): name for name in sharded.all_names}
    found: dict[nn.Module, list[tuple[nn.Module, str, str]]] = defaultdict(list)
    for module in sharded.model.modules():
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
