"""What every way of storing a moment has in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from safedelta_hf.core.low_rank import Matrix


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Data type and shape of one stored tensor.

    Attributes:
        dtype: Its data type.
        shape: Its shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.dtype.itemsize * prod(self.shape)


class Encoding(ABC):
    """Turns a moment into the tensors that are stored, and back.

    A new kind is one file with a subclass, and one entry of the registry.
    """

    name: ClassVar[str]

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, settings: str) -> "Encoding":
        """Read the settings that follow the name and a colon.

        Args:
            settings: The text; empty if there is none.

        Returns:
            The encoding.

        Raises:
            ValueError: It has no such settings.
        """
        if settings:
            raise ValueError(f"{cls.name} has no settings")
        return cls()

    def suited(self, shape: tuple[int, ...]) -> "Encoding":
        """What to store a moment of some shape in, if this kind gains nothing there.

        Args:
            shape: `(in, in)`; the diagonal kind is always stored as it is.

        Returns:
            This encoding, or a smaller one that loses less.
        """
        return self

    @abstractmethod
    def layouts(self, shape: tuple[int, ...]) -> Mapping[str, Layout]:
        """The tensors that a moment is stored in, known before there are any.

        Args:
            shape: Shape of the moment.

        Returns:
            Layouts by name.
        """

    @abstractmethod
    def encode(self, total: Tensor) -> dict[str, Tensor]:
        """Store a moment.

        Args:
            total: Symmetric, float32; for `Factor`, of low rank.

        Returns:
            Tensors by name, in their layouts.
        """

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor]) -> Matrix:
        """Read a moment.

        Args:
            stored: Tensors by name, in their layouts.

        Returns:
            The moment, symmetric, float32; of low rank where that is how it is stored.
        """

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Size of a stored moment.

        Args:
            shape: Shape of the moment.

        Returns:
            Bytes of its tensors.
        """
        return sum(layout.bytes for layout in self.layouts(shape).values())
