"""A model in the memory of one process or of many: what every backend answers of its parameters."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safedelta_hf.modules.names import base_modules, canonical, join


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a parameter that a process holds: some of the slices along its first dimension, or all of it.

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
    def whole(cls, shape: torch.Size) -> "Piece":
        """All of a parameter.

        Args:
            shape: Its shape.

        Returns:
            The piece.
        """
        size = shape[0] if shape else 1
        return cls(start=0, stop=size, size=size)

    @property
    def is_whole(self) -> bool:
        """Whether each process holds all of the parameter."""
        return self.group is None


class Watcher(Protocol):
    """Who sees the operations of a running model."""

    def follow(self, tensor: Tensor, name: str) -> None:
        """Take a tensor for the whole parameter of that name, as long as it lives."""
        ...

    def expect(self, parameter: Tensor, name: str) -> None:
        """Take a parameter for the whole of that name whenever it is met with memory: it is fetched once asked for."""
        ...

    def look_away(self) -> None:
        """See nothing until told to look again: the backend is fetching or freeing parameters."""
        ...

    def look_again(self) -> None:
        """See all operations again."""
        ...


class Holding(Protocol):
    """How this process holds the parameters of a model; they go by canonical names, those of adapters by their own.

    Reading and writing may be collective: all ranks do it for the same parameters in the same order.
    """

    kind: ClassVar[str]
    """What users call the backend."""

    collective: bool
    """Whether forward passes are collective, so that all ranks need the same number of them."""

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters, a tied one once."""
        ...

    def parameter(self, name: str) -> nn.Parameter:
        """What stands for a parameter in the model at this moment, be it sharded or empty."""
        ...

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole parameter."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Data type of the parameter."""
        ...

    def device(self, name: str) -> torch.device:
        """Where what `read` returns is."""
        ...

    def piece(self, name: str) -> Piece:
        """The part of a parameter that `read` returns and `write` takes."""
        ...

    def read(self, name: str) -> Tensor:
        """That part as a plain tensor, [stop - start, ...]; maybe the parameter's own memory, so not to be changed."""
        ...

    def write(self, name: str, value: Tensor) -> None:
        """Replace that part; the value has its shape, in any dtype, on any device."""
        ...

    def lend(self, name: str, value: Tensor) -> None:
        """Replace that part for a while: what an optimizer keeps of the parameter stays as it is."""
        ...

    def shown_to(self, watcher: Watcher) -> AbstractContextManager[None]:
        """Tell a watcher which tensors hold the parameters while the model runs."""
        ...


class Places:
    """Where each parameter stands in a model.

    Args:
        model: Any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[str, tuple[nn.Module, str]] = {}
        seen: set[nn.Parameter] = set()

        def add(prefix: str, module: nn.Module) -> None:
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter not in seen:
                    seen.add(parameter)
                    self._places[join(prefix, key)] = module, key

        for name, module in base_modules(model):
            add(name, module)
        for name, module in model.named_modules():
            add(canonical(f"{name}.").rstrip("."), module)

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters, a tied one once."""
        return tuple(self._places)

    def __getitem__(self, name: str) -> tuple[nn.Module, str]:
        return self._places[name]

    def parameter(self, name: str) -> nn.Parameter:
        """What stands for a parameter at this moment.

        Args:
            name: Its name.

        Returns:
            The parameter.
        """
        module, key = self._places[name]
        parameter = module._parameters[key]
        assert parameter is not None, name
        return parameter


class WholeParameters:
    """Plain parameters in memory. The base of the other kinds, of which each says what is different there.

    Args:
        model: The model.
    """

    kind: ClassVar[str] = "whole"
    collective = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places = Places(model)

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters, a tied one once."""
        return self._places.names

    def parameter(self, name: str) -> nn.Parameter:
        """What stands for a parameter in the model at this moment.

        Args:
            name: Its name.

        Returns:
            The parameter.
        """
        return self._places.parameter(name)

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole parameter.

        Args:
            name: Its name.

        Returns:
            The shape.
        """
        return self.parameter(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a parameter.

        Args:
            name: Its name.

        Returns:
            The data type.
        """
        return self.parameter(name).dtype

    def device(self, name: str) -> torch.device:
        """Where what `read` returns is.

        Args:
            name: Its name.

        Returns:
            The device.
        """
        return self.parameter(name).device

    def piece(self, name: str) -> Piece:
        """The part of a parameter that this process holds.

        Args:
            name: Its name.

        Returns:
            All of it.
        """
        return Piece.whole(self.shape(name))

    def read(self, name: str) -> Tensor:
        """That part of a parameter.

        Args:
            name: Its name.

        Returns:
            The parameter's own memory.
        """
        return self.parameter(name).detach()

    def write(self, name: str, value: Tensor) -> None:
        """Replace that part.

        Args:
            name: Its name.
            value: Of its shape.
        """
        with torch.no_grad():
            self.parameter(name).copy_(value)

    def lend(self, name: str, value: Tensor) -> None:
        """Replace that part for a while: what an optimizer keeps of the parameter stays as it is.

        Args:
            name: Its name.
            value: Of its shape.
        """
        self.write(name, value)

    @contextmanager
    def shown_to(self, watcher: Watcher) -> Iterator[None]:
        """Tell a watcher which tensors hold the parameters while the model runs.

        Args:
            watcher: Who is told.

        Yields:
            Nothing.
        """
        for name in self.names:
            watcher.follow(self.parameter(name), name)
        yield
