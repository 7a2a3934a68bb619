"""A model in the memory of one process or of many, and what of its parameters this process holds."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.modules.names import base_modules, canonical, join, parameter_names

Place = tuple[nn.Module, str]
"""A module and the name of its own parameter."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What a process holds of a parameter: some of the slices along its first dimension, or all of it.

    Attributes:
        start: The first of them.
        stop: One past the last; equal to `start` where this process holds none.
        size: Slices of the whole parameter; 1 for a scalar.
        group: The processes that hold the others; None where each process holds all of it.
    """

    start: int
    stop: int
    size: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def whole(cls, shape: torch.Size) -> "Shard":
        """All of a parameter.

        Args:
            shape: Its shape.

        Returns:
            The shard.
        """
        size = shape[0] if shape else 1
        return cls(start=0, stop=size, size=size)

    @property
    def is_whole(self) -> bool:
        """Whether each process holds all of the parameter."""
        return self.group is None

    def of(self, whole: Tensor) -> Tensor:
        """This shard of something that is laid out as the parameter is.

        Args:
            whole: [size, ...].

        Returns:
            A view of it, [stop - start, ...].
        """
        return whole if self.is_whole else whole[self.start : self.stop]


class ParameterObserver(Protocol):
    """Who sees the operations of a running model, and is told which tensors are parameters."""

    def track(self, tensor: Tensor, name: str) -> None:
        """Take a tensor for the whole parameter of that name, as long as it lives."""
        ...

    def track_when_loaded(self, parameter: Tensor, name: str) -> None:
        """Take a parameter for the whole of that name whenever it is met with memory: it is fetched once asked for."""
        ...

    def pause(self) -> None:
        """See nothing until told to resume: the backend is fetching or freeing parameters."""
        ...

    def resume(self) -> None:
        """See all operations again."""
        ...


class ShardedModel:
    """A model, what this process holds of its parameters, and the processes that hold the rest.

    This class is the plain case, in which every process holds all parameters as they are: a single process, and data
    parallelism. Each backend has a subclass that says what is different there; `open_model` finds it.

    Parameters go by canonical names, those of adapters by their own. Reading and writing may be collective: all ranks
    do it for the same parameters in the same order.

    Args:
        model: The model.
        ranks: The processes that work on it; this one alone if None.

    Attributes:
        model: The model.
        ranks: The processes.
        names: Canonical names of the parameters of the bare model, without those of adapters.
    """

    kind: ClassVar[str] = "whole"
    """What users call the backend."""

    collective: ClassVar[bool] = False
    """Whether forward passes are collective, so that all ranks need the same number of them."""

    def __init__(self, model: nn.Module, ranks: Ranks | None = None) -> None:
        self.model = model
        self.ranks = ranks or Ranks()
        self.names = tuple(parameter_names(model).values())
        self._places = _places(model)

    @property
    def is_local(self) -> bool:
        """Whether this process holds all parameters, as plain tensors that nothing else keeps copies of."""
        return type(self) is ShardedModel

    @property
    def runnable(self) -> nn.Module:
        """What is called for a forward pass in which no rank waits for another, unless the backend needs that."""
        # A data-parallel wrapper would exchange buffers, which ranks without a sequence take no part in.
        wrapped = self.model
        return wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped

    @property
    def all_names(self) -> tuple[str, ...]:
        """All parameters, those of adapters too; a tied one once."""
        return tuple(self._places)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole parameters of the bare model, by name."""
        return {name: tuple(self.shape(name)) for name in self.names}

    @property
    def data_types(self) -> dict[str, str]:
        """Data types of the parameters of the bare model, such as "bfloat16", by name."""
        return {name: str(self.dtype(name)).removeprefix("torch.") for name in self.names}

    def parameter(self, name: str, *, lent: bool = False) -> "Parameter":
        """One parameter, to be read and replaced.

        Args:
            name: Its name.
            lent: Whether it is replaced for a while only.

        Returns:
            The parameter, as this process holds it.
        """
        return Parameter(self, name, lent)

    def live(self, name: str) -> nn.Parameter:
        """What stands for a parameter in the model at this moment, be it sharded or empty.

        Args:
            name: Its name.

        Returns:
            The very object.
        """
        module, key = self._places[name]
        parameter = module._parameters[key]
        assert parameter is not None, name
        return parameter

    def shape(self, name: str) -> torch.Size:
        """Shape of a whole parameter.

        Args:
            name: Its name.

        Returns:
            The shape.
        """
        return self.live(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a parameter.

        Args:
            name: Its name.

        Returns:
            The data type.
        """
        return self.live(name).dtype

    def device(self, name: str) -> torch.device:
        """Where what `read` returns is.

        Args:
            name: Name of a parameter.

        Returns:
            The device.
        """
        return self.live(name).device

    def shard(self, name: str) -> Shard:
        """What `read` returns, and `write` takes, of a parameter.

        Args:
            name: Its name.

        Returns:
            All of it, unless the backend says otherwise.
        """
        return Shard.whole(self.shape(name))

    def read(self, name: str) -> Tensor:
        """This process's shard of a parameter.

        Args:
            name: Its name.

        Returns:
            A plain tensor; maybe the parameter's own memory, so not to be changed.
        """
        return self.live(name).detach()

    def write(self, name: str, value: Tensor) -> None:
        """Replace this process's shard of a parameter.

        Args:
            name: Its name.
            value: Of the shard's shape, in any dtype, on any device.
        """
        with torch.no_grad():
            self.live(name).copy_(value)

    def lend(self, name: str, value: Tensor) -> None:
        """Replace that shard for a while: what an optimizer keeps of the parameter stays as it is.

        Args:
            name: Name of the parameter.
            value: Of the shard's shape.
        """
        self.write(name, value)

    def gather(self, name: str) -> Tensor:
        """All of a parameter, on every rank.

        Args:
            name: Its name.

        Returns:
            A plain tensor; maybe the parameter's own memory.
        """
        return self.assembled(name, self.read(name))

    def assembled(self, name: str, rows: Tensor) -> Tensor:
        """All of something of which each rank has what it holds of a parameter.

        Args:
            name: Name of the parameter.
            rows: This rank's shard, laid out as that of the parameter is.

        Returns:
            The whole, on every rank; the shard itself where that is the whole.
        """
        shard = self.shard(name)
        return rows if shard.group is None else self.ranks.assembled(rows, shard.start, shard.size, shard.group)

    def state(self, *, but: Collection[str] = ()) -> dict[str, Tensor]:
        """What `state_dict()` would give of the model in one process, fetched one parameter at a time.

        Args:
            but: Names of parameters to leave out.

        Returns:
            Tensors in host memory by their names in the model, tied ones under each of them; empty but on the main
            rank.
        """
        values: dict[nn.Parameter, Tensor] = {}
        for name in self.all_names:
            if name not in but:
                value = self.gather(name)
                if self.ranks.is_main:
                    values[self.live(name)] = value.to("cpu", copy=True)
        state = {
            canonical(name): values[parameter]
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if parameter in values
        }
        return state | (_buffers(self.model) if self.ranks.is_main else {})

    @contextmanager
    def tracked_by(self, observer: ParameterObserver) -> Iterator[None]:
        """Tell an observer which tensors hold the parameters while the model runs.

        Args:
            observer: Who is told.

        Yields:
            Nothing.
        """
        for name in self.all_names:
            observer.track(self.live(name), name)
        yield


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model, as this process holds it.

    Attributes:
        model: The model.
        name: Its name there.
        lent: Whether it is replaced for a while only.
    """

    model: ShardedModel
    name: str
    lent: bool = False

    @property
    def shard(self) -> Shard:
        """What this process holds of it."""
        return self.model.shard(self.name)

    def read(self) -> Tensor:
        """This process's shard.

        Returns:
            A plain tensor; maybe the parameter's own memory, so not to be changed.
        """
        return self.model.read(self.name)

    def write(self, value: Tensor) -> None:
        """Replace this process's shard.

        Args:
            value: Of its shape.
        """
        replace = self.model.lend if self.lent else self.model.write
        replace(self.name, value)


def _places(model: nn.Module) -> dict[str, Place]:
    places: dict[str, Place] = {}
    seen: set[nn.Parameter] = set()

    def add(prefix: str, module: nn.Module) -> None:
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                places[join(prefix, key)] = module, key

    for name, module in base_modules(model):
        add(name, module)
    for name, module in model.named_modules():
        add(canonical(f"{name}.").rstrip("."), module)
    return places


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        canonical(join(place, key)): buffer.cpu()
        for place, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }


@contextmanager
def fetched_by_hooks(sharded: ShardedModel, observer: ParameterObserver) -> Iterator[None]:
    """Track parameters that a backend's own hooks fetch just before a module runs, and free after it.

    An observer sees none of the work of those hooks. Hooks of ours stand before and behind all others of each module:
    those in front make the observer pause, those behind let it resume. When a module is about to run, all that was
    fetched of it and of the modules inside it is shown, because a module may use the weights of another without calling
    it.

    Args:
        sharded: The model.
        observer: Who is told.

    Yields:
        Nothing.
    """
    model, own = sharded.model, _attributes(sharded)
    inside = {module: [place for inner in module.modules() for place in own[inner]] for module in model.modules()}

    def away(*_: Any) -> None:  # noqa: ANN401
        observer.pause()

    def again(*_: Any) -> None:  # noqa: ANN401
        observer.resume()

    def show(module: nn.Module, *_: Any) -> None:  # noqa: ANN401
        observer.resume()
        for owner, key, name in inside[module]:
            tensor = owner._parameters.get(key)
            if tensor is not None and _is_fetched(tensor):
                observer.track(tensor, name)

    for owner, key, name in inside[model]:
        parameter = owner._parameters[key]
        if parameter is not None and not isinstance(parameter, DTensor):
            observer.track_when_loaded(parameter, name)
    with ExitStack() as stack:
        for module in model.modules():
            for handle in (
                module.register_forward_pre_hook(away, prepend=True),
                module.register_forward_pre_hook(show),
                module.register_forward_hook(away, prepend=True),
                module.register_forward_hook(again),
            ):
                stack.callback(handle.remove)
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
