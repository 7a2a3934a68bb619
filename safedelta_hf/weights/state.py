"""The whole weights of a model that many processes hold, brought together in the main one."""

from collections.abc import Collection

from torch import Tensor, nn

from safedelta_hf.names import canonical, join
from safedelta_hf.sharding.held import HeldModel


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
