"""Every process holds all parameters: a single one, and data parallelism."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from safedelta_hf.sharding.holding import Piece, Places, Watcher


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
