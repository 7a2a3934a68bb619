"""Parameters that many processes hold, brought together whole: an adapter's on each of them, a model's in one."""

from collections.abc import Callable, Collection
from types import TracebackType

from torch import Tensor, nn

from safedelta_hf.distributed.model import Piece, WholeParameters
from safedelta_hf.distributed.open_model import HeldModel
from safedelta_hf.modules.names import canonical, join
from safedelta_hf.weights.journal import Journal, Replaceable


def gathered_state(held: HeldModel, but: Collection[str] = ()) -> dict[str, Tensor]:
    """What `state_dict()` would give of the model in one process, fetched one parameter at a time.

    Args:
        held: The model; all its ranks call this.
        but: Names of parameters to leave out.

    Returns:
        Tensors in host memory by their names in the model, tied ones under each of them; empty but on the main rank.
    """
    values: dict[nn.Parameter, Tensor] = {}
    for name in held.holding.names:
        if name not in but:
            value = whole(held, name)
            if held.ranks.is_main:
                values[held.holding.parameter(name)] = value.to("cpu", copy=True)
    state = {
        canonical(name): values[parameter]
        for name, parameter in held.model.named_parameters(remove_duplicate=False)
        if parameter in values
    }
    return state | (_buffers(held.model) if held.ranks.is_main else {})


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        canonical(join(place, key)): buffer.cpu()
        for place, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }


def whole(held: HeldModel, name: str) -> Tensor:
    """All of a parameter, on every rank.

    Args:
        held: The model; all its ranks call this.
        name: Name of the parameter.

    Returns:
        A plain tensor; maybe the parameter's own memory.
    """
    return assembled(held, name, held.holding.read(name))


def assembled(held: HeldModel, name: str, rows: Tensor) -> Tensor:
    """All of something of which each rank has what it holds of a parameter.

    Args:
        held: The model; all its ranks call this.
        name: Name of the parameter.
        rows: This rank's part, laid out as the parameter is.

    Returns:
        The whole, on every rank; the part itself where that is the whole.
    """
    piece = held.holding.piece(name)
    return rows if piece.group is None else held.ranks.assembled(rows, piece.start, piece.size, piece.group)


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
