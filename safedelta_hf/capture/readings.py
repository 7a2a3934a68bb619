"""What can be told about one operation of a running model."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from safedelta_hf.capture.origin import Origin
from safedelta_hf.records import Role

Arguments = Mapping[str, Any]


class Readings(Protocol):
    """What can be told about one operation."""

    def origin(self, value: object) -> Origin | None:
        """Which weight a value is, or None."""
        ...

    def sorted_origin(self, value: Tensor) -> tuple[Origin, list[list[int]]] | None:
        """Which weight a value is once its indices are sorted, and the indices that sort it, or None."""
        ...

    def is_data(self, value: object) -> bool:
        """Whether a value depends on what the model was given."""
        ...

    def is_constant(self, value: object) -> bool:
        """Whether a value is a tensor that depends neither on what the model was given nor on a parameter."""
        ...

    def derive(self, result: Tensor, source: Origin, slope: float | Tensor) -> None:
        """The result is made of a weight alone, entry by entry."""
        ...

    def product(self, weight: Origin, inputs: Tensor, role: Role | None = None) -> None:
        """Inputs [tokens, columns] times the transpose of a weight [rows, columns]."""
        ...

    def scale(self, weight: Origin, squares: Tensor, repetitions: int) -> None:
        """Entries of a weight times something whose squares, summed over repetitions, are given; any shape."""
        ...

    def offset(self, weight: Origin, repetitions: int) -> None:
        """Entries of a weight, each added so many times."""
        ...

    def lookup(self, weight: Origin, rows: Tensor) -> None:
        """Rows of a weight [rows, features], by number."""
        ...


Handler = Callable[[Readings, Arguments, Any], bool]
"""Tells what an operation does with its weights; False if it does something else with them."""
