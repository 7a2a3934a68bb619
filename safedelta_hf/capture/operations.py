"""How each primitive operation uses a weight: the few forms to which everything that a model computes comes down.

Modules, einsum, parametrisations and fused layers all end in these, so a weight is seen wherever it is multiplied.
"""

from typing import Any

import torch
from torch import Tensor

from safedelta_hf.capture.elementwise import ELEMENTWISE
from safedelta_hf.capture.products import PRODUCTS
from safedelta_hf.capture.readings import Arguments, Handler, Readings

aten = torch.ops.aten


def slopes_of(func: Any, given: Arguments) -> Tensor | None:  # noqa: ANN401
    """Derivative of an elementwise function of one tensor, by central differences in float64.

    Args:
        func: Any operation.
        given: Its arguments by name.

    Returns:
        The derivative at each entry, or None if it is no such function.
    """
    tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
    if torch.Tag.pointwise not in getattr(func, "tags", ()) or func._schema.is_mutable or len(tensors) != 1:
        return None
    value = given[tensors[0]].double()
    step = 1e-5 * value.abs().clamp_min(1.0)
    above, below = (func(**{**given, tensors[0]: value + sign * step}) for sign in (1, -1))
    slopes: Tensor = (above - below) / (2 * step)
    return slopes


def _nothing(see: Readings, given: Arguments, result: object) -> bool:
    return True


HANDLERS: dict[Any, Handler] = (
    PRODUCTS
    | ELEMENTWISE
    | {
        aten.empty_like.default: _nothing,
        aten.zeros_like.default: _nothing,
        aten.ones_like.default: _nothing,
        aten.new_empty.default: _nothing,
        aten.new_zeros.default: _nothing,
        aten.new_ones.default: _nothing,
        aten._local_scalar_dense.default: _nothing,
    }
)
"""What each operation does with its weights. One that is not here covers none, and is named in the report."""
