"""Weights that are held in fewer bits than they stand for: never read as numbers here, only recognised."""

import copy
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is packed, as those of bitsandbytes (integers) and torchao (tensor subclasses) are.

    Args:
        weight: A parameter.

    Returns:
        Whether its entries cannot be read from it directly.
    """
    if isinstance(weight, DTensor):
        return is_quantised(weight.to_local())  # itself a tensor subclass, as packed ones are
    return not weight.is_floating_point() or hasattr(weight, "__tensor_flatten__")


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """The plain tensors that tell a weight from others.

    Args:
        weight: A parameter, packed or not.

    Returns:
        Of torchao the packed data with its scales; of bitsandbytes the packed codes; else the weight itself.
    """
    if hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        return [plain for name in names for plain in stored_tensors(getattr(weight, name))]
    state = getattr(weight, "quant_state", None)
    return [_in_original_order(weight, state) if getattr(state, "packing_format_for_cpu", False) else weight]


def _in_original_order(weight: Tensor, state: Any) -> Tensor:  # noqa: ANN401 - a class of bitsandbytes
    # On a CPU, bitsandbytes reorders the codes at the first forward pass and rounds their scales. The codes come back
    # exactly, the scales do not, so they are left out also where nothing was reordered.
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    untouched = copy.copy(state)
    untouched.original_nested = False
    codes: Tensor = _convert_weight_packed_for_cpu_inverse(weight.detach().clone().as_subclass(Tensor), untouched)[0]
    return codes
