"""Parameters that accelerate keeps in host memory or on disk, and fetches for the time that their module runs."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from torch import Tensor, nn
from typing_extensions import override

from safedelta_hf.distributed.model import ParameterObserver, Place, ShardedModel
from safedelta_hf.distributed.offload_hooks import Slot, fetching_hooks, memory_of, modules_of
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.modules.names import base_modules, join, unwrapped
from safedelta_hf.modules.quantised import is_quantised


class OffloadedModel(ShardedModel):
    """Parameters of which the model holds some, or all, only while they are used; they are read one at a time.

    Args:
        model: The model.
        ranks: The processes that work on it.

    Raises:
        ConfigurationError: A parameter is nowhere to be found, or offloaded in a way that is not covered.
    """

    kind: ClassVar[str] = "CPU or disk offload"

    def __init__(self, model: nn.Module, ranks: Ranks | None = None) -> None:
        kept = _kept_parameters(model)
        _tie_placeholders(model, kept)
        super().__init__(model, ranks)
        names = {self.live(name): name for name in self.all_names}
        self._owned: dict[nn.Module, list[tuple[str, str]]] = defaultdict(list)
        self._slots: dict[str, list[Slot]] = defaultdict(list)
        for module in model.modules():
            for key, parameter in _own(module):
                self._owned[module].append((key, names[parameter]))
                self._slots[names[parameter]] += kept.get((module, key), [])
        for name in self.all_names:
            _require_covered(name, self.live(name), self._slots[name])

    @override
    def device(self, name: str) -> torch.device:
        slots = self._slots[name]
        return slots[0].device if slots else super().device(name)

    @override
    def read(self, name: str) -> Tensor:
        slots = self._slots[name]
        return slots[0].read().to(self.dtype(name)) if slots else super().read(name)

    @override
    def write(self, name: str, value: Tensor) -> None:
        # On disk it goes to a file of its own beside the offloaded ones, so it takes no memory, and the files that the
        # model was loaded from stay as they are.
        value, file = value.detach().to(self.dtype(name)), None
        for slot in self._slots[name]:
            file = slot.write(value, file)
        if not self.live(name).is_meta:
            super().write(name, value)

    @override
    @contextmanager
    def tracked_by(self, observer: ParameterObserver) -> Iterator[None]:
        # The hooks run inside a module's `forward`, behind the hooks of PyTorch, so the hooks themselves are wrapped.
        self._show(self.model.modules(), observer)
        try:
            with ExitStack() as stack:
                for module in self.model.modules():
                    for hook in fetching_hooks(module):
                        stack.enter_context(self._wrapped(hook, observer))
                yield
        finally:
            for module, owned in self._owned.items():
                for key, name in owned:
                    if module._parameters[key].is_meta:  # type: ignore[union-attr]
                        module._parameters[key] = self.live(name)

    def _show(self, modules: Iterator[nn.Module], observer: ParameterObserver) -> None:
        for module in modules:
            for key, name in self._owned[module]:
                parameter = module._parameters[key]
                if parameter is not None and not parameter.is_meta:
                    observer.track(parameter, name)

    @contextmanager
    def _wrapped(self, hook: AlignDevicesHook | CpuOffload, observer: ParameterObserver) -> Iterator[None]:
        fetch, put_back = hook.pre_forward, hook.post_forward

        def pre_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            result = _unseen(observer, lambda: fetch(module, *args, **kwargs))
            self._show((inner for _, inner in modules_of(hook, module)), observer)
            return result

        def post_forward(module: nn.Module, output: Any) -> Any:  # noqa: ANN401
            return _unseen(observer, lambda: put_back(module, output))

        with _attribute(hook, "pre_forward", pre_forward), _attribute(hook, "post_forward", post_forward):
            yield


def _unseen(observer: ParameterObserver, work: Callable[[], Any]) -> Any:  # noqa: ANN401
    observer.pause()
    try:
        return work()
    finally:
        observer.resume()


@contextmanager
def _attribute(hook: object, name: str, value: object) -> Iterator[None]:
    before = vars(hook).get(name)
    setattr(hook, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(hook, name)
        else:
            setattr(hook, name, before)


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(key, parameter) for key, parameter in module._parameters.items() if parameter is not None]


def _kept_parameters(model: nn.Module) -> dict[Place, list[Slot]]:
    kept: dict[Place, list[Slot]] = defaultdict(list)
    for module in model.modules():
        for hook in fetching_hooks(module):
            for name, inner in modules_of(hook, module):
                for key, _ in _own(inner):
                    slot = Slot.of(hook, name, key)
                    if slot is not None:
                        kept[inner, key].append(slot)
    return kept


def _tie_placeholders(model: nn.Module, kept: dict[Place, list[Slot]]) -> None:
    """Let tied parameters be one again.

    After each forward pass accelerate leaves a placeholder of its own in every place of a tied parameter.
    """
    first: dict[tuple[Any, ...], Place] = {}
    for module in model.modules():
        for key, parameter in _own(module):
            slots = kept.get((module, key), [])
            identity = slots[0].identity if slots else memory_of(parameter)
            if identity is not None:
                _tie(first.setdefault(identity, (module, key)), (module, key))
    places: dict[str, Place] = {
        join(name, key): (module, key)
        for name, module in base_modules(model, every_name=True)
        for key, _ in _own(module)
    }
    declared = getattr(unwrapped(model), "all_tied_weights_keys", None) or {}
    for target, source in declared.items():
        if target in places and source in places:
            one, other = kept.get(places[source], []), kept.get(places[target], [])
            if one and other and torch.equal(one[0].read(), other[0].read()):
                _tie(places[source], places[target])


def _tie(one: Place, other: Place) -> None:
    # What is no placeholder is kept in the model, and both take its object.
    live, placeholder = (other, one) if _at(one).is_meta else (one, other)
    if _at(placeholder).is_meta and _at(placeholder).shape == _at(live).shape:
        placeholder[0]._parameters[placeholder[1]] = _at(live)


def _at(place: Place) -> nn.Parameter:
    parameter = place[0]._parameters[place[1]]
    assert parameter is not None, place
    return parameter


def _require_covered(name: str, parameter: nn.Parameter, slots: list[Slot]) -> None:
    if slots and is_quantised(parameter):
        raise ConfigurationError(
            f"{name}: it is quantised and offloaded at once, which is not covered; keep quantised layers on a device, "
            "or offload the model unquantised"
        )
    if parameter.is_meta and not slots:
        raise ConfigurationError(
            f"{name}: it is on the meta device, and no hook of accelerate knows its values; load the model with "
            "from_pretrained, or dispatch it with all of its weights. Adapters that PEFT adds to offloaded layers end "
            "like this: adapt layers that stay on a device"
        )
