"""Tensors of an adapter that many processes hold: small enough to be brought together whole on each of them."""

from collections.abc import Callable
from types import TracebackType

from torch import Tensor, nn

from safedelta_hf.sharding.held import HeldModel
from safedelta_hf.sharding.holding import Piece
from safedelta_hf.sharding.whole import WholeParameters
from safedelta_hf.weights.journal import Journal, Replaceable
from safedelta_hf.weights.state import whole

Whole = Callable[[Tensor], Tensor]
"""Gives all of a parameter."""


def as_it_is(tensor: Tensor) -> Tensor:
    """All of a parameter that this process holds whole.

    Args:
        tensor: The parameter.

    Returns:
        The same.
    """
    return tensor


class WholeTensors:
    """Copies of sharded parameters, each brought together once; other parameters as they are.

    Args:
        held: The model; all its ranks ask for the same parameters in the same order.
    """

    def __init__(self, held: HeldModel) -> None:
        self._held = held
        is_plain = type(held.holding) is WholeParameters
        names = () if is_plain else held.holding.names
        self._names: dict[nn.Parameter, str] = {held.holding.parameter(name): name for name in names}
        self._copies: dict[str, Tensor] = {}

    def of(self, parameter: Tensor) -> Tensor:
        """All of a parameter.

        Args:
            parameter: As it stands in the model.

        Returns:
            Itself, or a plain copy.
        """
        name = self._names.get(parameter)  # type: ignore[call-overload]
        if name is None:
            return parameter
        if name not in self._copies:
            self._copies[name] = whole(self._held, name).clone()
        return self._copies[name]

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of a whole parameter.

        Args:
            parameter: As it stands in the model.

        Returns:
            Its shape.
        """
        name = self._names.get(parameter)
        return tuple(parameter.shape if name is None else self._held.holding.shape(name))

    def place(self, tensor: Tensor) -> Tensor | Replaceable:
        """What to replace for a tensor that `of` gave.

        Args:
            tensor: The tensor.

        Returns:
            Itself, or the copy together with the parameter behind it.
        """
        for name, copy in self._copies.items():
            if copy is tensor:
                return _CopyOfParameter(self._held, name, copy)
        return tensor


class WritesThrough:
    """Replaces tensors, and the sharded parameters that they are copies of.

    Args:
        journal: Writes, and puts back on failure.
        tensors: Knows which tensors are copies.
    """

    def __init__(self, journal: Journal, tensors: WholeTensors) -> None:
        self._journal, self._tensors = journal, tensors

    def __enter__(self) -> "WritesThrough":
        self._journal.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    def replace(self, name: str, parameter: Tensor, value: Tensor) -> None:
        """Write a new value into a tensor.

        Args:
            name: Under which its original is kept.
            parameter: From `WholeTensors`.
            value: Of its shape.
        """
        self._journal.replace(name, self._tensors.place(parameter), value)


class _CopyOfParameter:
    """A copy of a whole parameter, and this process's part of the parameter itself."""

    def __init__(self, held: HeldModel, name: str, copy: Tensor) -> None:
        self._held, self._name, self._copy = held, name, copy

    @property
    def piece(self) -> Piece:
        return Piece.whole(self._copy.shape)

    def read(self) -> Tensor:
        return self._copy

    def write(self, value: Tensor) -> None:
        self._copy.copy_(value)
        piece = self._held.holding.piece(self._name)
        self._held.holding.write(self._name, self._copy[piece.start : piece.stop] if piece.group else self._copy)
