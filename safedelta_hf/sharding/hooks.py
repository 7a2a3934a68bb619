"""Backends whose own hooks fetch parameters just before a module runs, and free them after it."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from safedelta_hf.sharding.holding import Places, Watcher


@contextmanager
def fetched_by_hooks(model: nn.Module, places: Places, watcher: Watcher) -> Iterator[None]:
    """Show a watcher each parameter as its module is about to run, and none of the work of the backend's hooks.

    Hooks of ours stand before and behind all others of each module: those in front make the watcher look away, those
    behind let it look again.

    Args:
        model: The model.
        places: Where its parameters stand.
        watcher: Who is told.

    Yields:
        Nothing.
    """
    owned: dict[nn.Module, list[tuple[str, str]]] = defaultdict(list)
    for name in places.names:
        module, key = places[name]
        owned[module].append((name, key))

    def away(*_: Any) -> None:  # noqa: ANN401
        watcher.look_away()

    def again(*_: Any) -> None:  # noqa: ANN401
        watcher.look_again()

    def show(module: nn.Module, *_: Any) -> None:  # noqa: ANN401
        watcher.look_again()
        for name, key in owned[module]:
            tensor: Tensor | None = module._parameters[key]
            if tensor is not None:
                watcher.follow(tensor, name)

    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(_removed(module.register_forward_pre_hook(away, prepend=True)))
            stack.enter_context(_removed(module.register_forward_pre_hook(show)))
            stack.enter_context(_removed(module.register_forward_hook(away, prepend=True)))
            stack.enter_context(_removed(module.register_forward_hook(again)))
        yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:  # noqa: ANN401
    try:
        yield
    finally:
        handle.remove()
