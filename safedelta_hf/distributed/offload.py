"""Parameters that accelerate keeps in host memory or on disk, and fetches for the time that their module runs."""

import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, ModelHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import override

from safedelta_hf.distributed.model import ParameterObserver, Place, ShardedModel
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.modules.names import base_modules, join, unwrapped
from safedelta_hf.modules.quantised import is_quantised

WEIGHT = "weight"
"""What a parameter is called in a file of its own."""


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate fetches any parameter of a model from elsewhere.

    Args:
        model: Any module.

    Returns:
        Whether it does.
    """
    return any(_fetching_hooks(module) for module in model.modules())


def execution_device(model: nn.Module) -> torch.device | None:
    """Where accelerate brings the inputs of a model that it fetches parameters for.

    Args:
        model: Any module.

    Returns:
        The device of the first module that has any fetched; None if there is none.
    """
    devices = (hook.execution_device for module in model.modules() for hook in _fetching_hooks(module))
    return next((torch.device(device) for device in devices if device is not None), None)


def require_trainable(model: nn.Module) -> None:
    """Stop before offloaded parameters are trained in vain.

    An optimizer would be given their placeholders, which no gradient ever reaches, and nothing would say so.

    Args:
        model: The model that will be trained.

    Raises:
        ConfigurationError: One of them is offloaded and not frozen.
    """
    if not is_offloaded(model):
        return
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter.requires_grad:
            raise ConfigurationError(
                f"{name}: it is offloaded to host memory or disk, where training does not reach it; freeze it with "
                "requires_grad_(False), or keep its layer on a device (device_map)"
            )


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
                    for hook in _fetching_hooks(module):
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
            self._show((inner for _, inner in _modules_of(hook, module)), observer)
            return result

        def post_forward(module: nn.Module, output: Any) -> Any:  # noqa: ANN401
            return _unseen(observer, lambda: put_back(module, output))

        with _attribute(hook, "pre_forward", pre_forward), _attribute(hook, "post_forward", post_forward):
            yield


@dataclass(frozen=True)
class Slot:
    """Where accelerate keeps one parameter.

    Attributes:
        hook: Fetches it.
        weights: The mapping that it is read from.
        key: Its name there.
    """

    hook: AlignDevicesHook
    weights: Mapping[str, Tensor]
    key: str

    @classmethod
    def of(cls, hook: AlignDevicesHook | CpuOffload, module: str, key: str) -> "Slot | None":
        """Find where a hook keeps a parameter.

        Args:
            hook: One of `_fetching_hooks`.
            module: The module that has the parameter, by its name inside the one that has the hook.
            key: The parameter's name in it.

        Returns:
            The place; None if the hook does not keep it.

        Raises:
            ConfigurationError: It is kept in something that cannot be written to.
        """
        if isinstance(hook, CpuOffload) or hook.weights_map is None:
            return None
        weights, name = hook.weights_map, join(module, key)
        while isinstance(weights, PrefixedDataset):
            weights, name = weights.dataset, f"{weights.prefix}{name}"
        if isinstance(weights, OffloadedWeightsLoader):
            is_kept = name in weights.state_dict or name in weights.index
        elif isinstance(weights, dict):
            is_kept = name in weights
        else:
            raise ConfigurationError(
                f"{name}: it is offloaded to a {type(weights).__name__}, which cannot be written to; load the model "
                "with a device_map, or use accelerate's cpu_offload or disk_offload"
            )
        return cls(hook, weights, name) if is_kept else None

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """The same for parameters that are kept in the same place; None if that cannot be told."""
        kept = self._in_memory
        if kept is not None:
            return _memory_of(kept)
        info = self._files.index[self.key]
        file = info.get("safetensors_file")
        return None if file is None else (str(file), info.get("weight_name", self.key))

    @property
    def device(self) -> torch.device:
        """Where the parameter is computed with."""
        device = torch.device(self.hook.execution_device or "cpu")
        return torch.device("cpu") if device.type == "meta" else device

    def read(self) -> Tensor:
        """What is kept.

        Returns:
            It, where it is computed with; the very memory that keeps it, if that is there.
        """
        return self.weights[self.key].detach().to(self.device)

    def write(self, value: Tensor, file: "OwnFile | None") -> "OwnFile | None":
        """Replace what is kept: in memory in place, on disk by a file of our own, so that no file of others is changed.

        Args:
            value: Of the same shape, in the data type of the parameter.
            file: A file that holds the value already, if there is one.

        Returns:
            A file that holds the value, if one was needed.
        """
        kept = self._in_memory
        if kept is not None:
            with torch.no_grad():
                kept.copy_(value)
            return file
        file = file or OwnFile(value, self._files.save_folder)
        entry = {"safetensors_file": file.path, "weight_name": WEIGHT, "dtype": _name(value.dtype), "owner": file}
        # The index may be the caller's, and serve other models.
        self._files.index = {**self._files.index, self.key: entry}
        return file

    @property
    def _in_memory(self) -> Tensor | None:
        kept = self.weights.state_dict if isinstance(self.weights, OffloadedWeightsLoader) else self.weights
        return kept.get(self.key)

    @property
    def _files(self) -> Any:  # noqa: ANN401 - accelerate has no types
        return self.weights


class OwnFile:
    """A tensor in a file that is removed with the last thing that refers to this object, or at exit.

    Args:
        value: The tensor.
        folder: Where to make it; None for the system's temporary folder.
    """

    def __init__(self, value: Tensor, folder: str | Path | None) -> None:
        handle, self.path = tempfile.mkstemp(prefix="safedelta-", suffix=".safetensors", dir=folder)
        os.close(handle)
        weakref.finalize(self, _remove, self.path, os.getpid())
        save_file({WEIGHT: value.detach().cpu().contiguous()}, self.path)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnFile":
        return self  # a copied model reads the same file, which has to last as long


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
        for hook in _fetching_hooks(module):
            for name, inner in _modules_of(hook, module):
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
            identity = slots[0].identity if slots else _memory_of(parameter)
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


def _fetching_hooks(module: nn.Module) -> list[AlignDevicesHook | CpuOffload]:
    # Those inside a sequence of hooks one by one.
    return [hook for hook in _single(getattr(module, "_hf_hook", None)) if _fetches(hook)]


def _modules_of(hook: AlignDevicesHook | CpuOffload, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # The modules whose parameters the hook fetches, each with its name inside that which the hook is on.
    whole = isinstance(hook, CpuOffload) or hook.place_submodules
    return module.named_modules() if whole else iter([("", module)])


def _memory_of(tensor: Tensor) -> tuple[Any, ...] | None:
    if tensor.is_meta or not tensor.numel():
        return None
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _single(hook: ModelHook | None) -> Iterator[ModelHook]:
    if isinstance(hook, SequentialHook):
        for one in hook.hooks:
            yield from _single(one)
    elif hook is not None:
        yield hook


def _fetches(hook: ModelHook) -> bool:
    return isinstance(hook, CpuOffload) or (isinstance(hook, AlignDevicesHook) and bool(hook.offload))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:  # not in a worker that was forked from it
        with suppress(OSError):
            os.unlink(path)
